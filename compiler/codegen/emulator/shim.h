// Runs the device source of a CUDA kernel on the CPU, thread by thread. Written for tests: slow, strict, deterministic.
//
// Every CUDA thread is a fiber on a stack of its own; a fiber runs until it waits for others. The order in which fibers
// run is shuffled from a seed, so code that needs one order fails for some seed; with an even one a warp, and a block,
// runs as far as it can before another does. Copies that a GPU makes in the
// background are made either at once (eager) or at the last moment that the program allows (lazy): the first finds
// buffers that are overwritten too early, the second finds data that is used before it was waited for.
// What is not modelled: caches, bank conflicts, memory ordering between threads without a barrier, speed.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "types.h"

namespace emu {
constexpr int kWarp = 32, kStackBytes = 128 << 10, kDynamic = 256 << 10, kStatic = 16 << 10, kStatics = 4, kGuard = 1024;

struct Barrier { int arrived = 0; unsigned generation = 0; };
struct Mbarrier { int count = 0, pending = 0; int64_t bytes = 0; int phase = 0; bool ready = false; };
struct AsyncCopy { unsigned to; const void* from; int size, valid; };
struct BoxCopy { unsigned to; CUtensorMap map; int column, row; unsigned barrier; };

struct Wgmma { float* d[128]; int n; uint64_t a, b; int keep; bool fp8; };

struct Cta {
  dim3_ block;
  std::unique_ptr<uint8_t[]> memory;
  uint8_t* shared = nullptr;  // aligned to 1024
  int dynamic_bytes = 0, alive = 0;
  Barrier all, named[16], warp[32];
  std::vector<uint32_t> exchange;  // [2][threads][8]
  std::vector<std::pair<unsigned, Mbarrier>> mbarriers;
  std::vector<BoxCopy> boxes;  // issued and, when lazy, not yet landed
};

struct Fiber {
  ucontext_t start;
  jmp_buf state;
  std::unique_ptr<char[]> stack;
  bool started = false, done = false;
  Cta* cta = nullptr;
  dim3_ thread;
  int parity = 0;
  const int* seen_at = nullptr;
  int seen = 0;
  std::vector<std::vector<AsyncCopy>> groups;  // committed, oldest first
  std::vector<AsyncCopy> open;
  std::vector<std::vector<Wgmma>> wgmma_groups{{}};  // the last one is open
};

static Fiber* now;
static jmp_buf scheduler;
static int num_threads;
static bool lazy;
static bool progress;
static char error_text[512];
static bool failed;
static const char* waiting_for = "";

static void fail(const char* format, ...) {
  if (!failed) {
    va_list args;
    va_start(args, format);
    int n = snprintf(error_text, sizeof error_text, "block (%d,%d) thread %d: ", now->cta->block.x, now->cta->block.y, now->thread.x);
    vsnprintf(error_text + n, sizeof error_text - n, format, args);
    va_end(args);
  }
  failed = true;
  longjmp(scheduler, 2);
}

__attribute__((noinline)) static void yield() {
  if (_setjmp(now->state) == 0) _longjmp(scheduler, 1);
}
template <class Ready> static void wait_until(const char* what, Ready ready) {
  while (!ready()) {
    waiting_for = what;
    yield();
  }
  progress = true;
}
static void barrier(Barrier& b, int count, const char* what) {
  unsigned generation = b.generation;
  progress = true;
  if (++b.arrived == count) {
    b.arrived = 0;
    b.generation++;
    return;
  }
  wait_until(what, [&] { return b.generation != generation; });
}
// A look at global memory that other blocks write. A thread that sees the same number again lets the others run first;
// a round of all threads in which nobody sees anything new is a deadlock.
static int acquire(const int* p) {
  if (now->seen_at == p && now->seen == *p) {
    waiting_for = "a number in global memory that another block writes";
    yield();
  }
  if (now->seen_at != p || now->seen != *p) progress = true;
  now->seen_at = p;
  return now->seen = *p;
}
static inline int lane() { return now->thread.x % kWarp; }
static inline int warp() { return now->thread.x / kWarp; }
static int warp_size() { return std::min(kWarp, num_threads - warp() * kWarp); }
static void warp_barrier() { barrier(now->cta->warp[warp()], warp_size(), "the other lanes of its warp"); }

// Shows words to the other lanes of the warp; the result points to the words of lane 0.
static uint32_t (*share(const uint32_t* words, int n))[8] {
  now->parity ^= 1;
  auto* table = reinterpret_cast<uint32_t(*)[8]>(now->cta->exchange.data()) + now->parity * num_threads;
  memcpy(table[now->thread.x], words, n * 4);
  warp_barrier();
  return table + warp() * kWarp;
}
template <class T> static T shuffle(uint64_t mask, T value, int source) {
  static_assert(sizeof(T) <= 8, "a shuffle moves 4 or 8 bytes");
  if ((uint32_t)mask != 0xffffffffu) fail("a shuffle whose mask is not the whole warp");
  uint32_t words[2] = {0, 0};
  memcpy(words, &value, sizeof(T));
  auto* table = share(words, 2);
  T result;
  memcpy(&result, table[source & (kWarp - 1)], sizeof(T));
  return result;
}

static inline uint8_t* shared_at(unsigned address, int size, int align, const char* what) {
  bool dynamic = address + size <= (unsigned)now->cta->dynamic_bytes;
  bool fixed = address >= (unsigned)kDynamic && address + size <= (unsigned)(kDynamic + kStatics * kStatic);
  if (!dynamic && !fixed) fail("%s at shared address %u, past the %d bytes of the launch", what, address, now->cta->dynamic_bytes);
  if (address % align) fail("%s at shared address %u, not a multiple of %d", what, address, align);
  return now->cta->shared + address;
}
static inline unsigned address_of_shared(const void* p) { return (unsigned)((const uint8_t*)p - now->cta->shared); }

static inline const void* aligned(const void* p, int size) {
  if ((uintptr_t)p % size) fail("a vector access to global memory that is not aligned to %d bytes", size);
  return p;
}
static inline void* aligned(void* p, int size) { return (void*)aligned((const void*)p, size); }
static inline uint32_t pack_bf16(float low, float high) {
  return nv_bfloat16(low).bits | (uint32_t)nv_bfloat16(high).bits << 16;
}

static inline uint16_t pack_e4m3(float low, float high) {
  return __nv_fp8_e4m3(low).bits | (uint16_t)__nv_fp8_e4m3(high).bits << 8;
}

// cp.async
static void land(const AsyncCopy& c) {
  memset(now->cta->shared + c.to, 0, c.size);
  memcpy(now->cta->shared + c.to, c.from, c.valid);
}
static void cp_async(unsigned to, const void* from, int size, int valid) {
  shared_at(to, size, size, "cp.async");
  if ((uintptr_t)from % size) fail("cp.async from an address that is not a multiple of %d", size);
  AsyncCopy copy{to, from, size, valid};
  if (lazy) now->open.push_back(copy);
  else land(copy);
}
static void cp_commit() {
  now->groups.push_back(now->open);
  now->open.clear();
}
static void cp_wait(int left) {
  while ((int)now->groups.size() > left) {
    for (auto& c : now->groups.front()) land(c);
    now->groups.erase(now->groups.begin());
  }
}

// mbarrier and TMA
static Mbarrier& mbar(unsigned address) {
  for (auto& [at, b] : now->cta->mbarriers)
    if (at == address) return b;
  fail("mbarrier at shared address %u was not initialised", address);
  abort();
}
static void mbar_init(unsigned address, int count) {
  shared_at(address, 8, 8, "mbarrier.init");
  for (auto& [at, b] : now->cta->mbarriers)
    if (at == address) fail("mbarrier at shared address %u was initialised twice", address);
  now->cta->mbarriers.push_back({address, Mbarrier{count, count, 0, 0, true}});
}
static void mbar_check(Mbarrier& b) {
  if (b.pending < 0) fail("an mbarrier had more arrivals than it expects");
  if (b.pending == 0 && b.bytes == 0) {
    b.phase ^= 1;
    b.pending = b.count;
    progress = true;
  }
}
static void mbar_arrive(unsigned address, int count, int64_t bytes) {
  auto& b = mbar(address);
  b.bytes += bytes;
  b.pending -= count;
  mbar_check(b);
}
static void land(const BoxCopy& c) {
  const CUtensorMap& m = c.map;
  int row_bytes = m.box_columns * m.element_bytes;
  for (int r = 0; r < m.box_rows; r++)
    for (int x = 0; x < row_bytes; x++) {
      unsigned linear = c.to + r * row_bytes + x, place = linear ^ (((linear >> 7) & 7) << 4);
      int64_t row = (int64_t)c.row + r, column = (int64_t)c.column + x / m.element_bytes;
      bool inside = row >= 0 && row < m.rows && column >= 0 && column < m.columns;
      now->cta->shared[place] = inside ? m.base[row * m.pitch_bytes + (int64_t)c.column * m.element_bytes + x] : 0;
    }
  auto& b = mbar(c.barrier);
  b.bytes -= (int64_t)row_bytes * m.box_rows;
  mbar_check(b);
}
static void tma_load(unsigned to, const CUtensorMap* map, int column, int row, unsigned barrier_address) {
  int bytes = map->box_columns * map->element_bytes;
  if (bytes != 128) fail("a tensor map whose box is %d bytes wide; the model has the 128-byte swizzle only", bytes);
  shared_at(to, bytes * map->box_rows, 1024, "a TMA load");
  BoxCopy copy{to, *map, column, row, barrier_address};
  if (lazy) now->cta->boxes.push_back(copy);
  else land(copy);
}
static void mbar_wait(unsigned address, int parity) {
  wait_until("an mbarrier", [&] {
    if (mbar(address).phase != (parity & 1)) return true;
    auto& boxes = now->cta->boxes;
    for (size_t i = 0; i < boxes.size(); i++)
      if (boxes[i].barrier == address) {
        BoxCopy copy = boxes[i];
        boxes.erase(boxes.begin() + i);
        land(copy);
        break;
      }
    return mbar(address).phase != (parity & 1);
  });
}

// tensor cores: bf16 and e4m3 operands, f32 sums
static inline float bf16_at(uint32_t word, int half) {
  uint32_t u = half ? word & 0xffff0000u : word << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static inline float e4m3_at(uint32_t word, int byte) {
  static float values[256];
  if (values[1] == 0)
    for (int i = 0; i < 256; i++) {
      __nv_fp8_e4m3 v;
      v.bits = i;
      values[i] = v;
    }
  return values[(word >> (8 * byte)) & 0xff];
}
static inline uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  auto one = [&](int half) { return std::fma(bf16_at(a, half), bf16_at(b, half), bf16_at(c, half)); };
  return pack_bf16(one(0), one(1));
}
// m16n8 with a 32-byte deep k: 16 values of bf16 or 32 of e4m3. Lane maps: PTX ISA, "Matrix fragments for mma.m16n8k16/32".
template <bool kFp8> static void mma(float* d, const uint32_t* ab, const float* c) {
  constexpr int per_word = kFp8 ? 4 : 2, depth = 8 * per_word, half = depth / 2;
  auto value = [](uint32_t word, int i) { return kFp8 ? e4m3_at(word, i) : bf16_at(word, i); };
  auto* table = share(ab, 6);
  int group = lane() / 4, pair = lane() % 4;
  for (int i = 0; i < 4; i++) {
    int row = group + 8 * (i / 2), column = 2 * pair + i % 2;
    float sum = c[i];
    for (int k = 0; k < depth; k++) {
      int source = (k % half) / per_word, part = k % per_word, upper = k / half;
      float a = value(table[(row % 8) * 4 + source][row / 8 + 2 * upper], part);
      float b = value(table[column * 4 + source][4 + upper], part);
      sum += a * b;
    }
    d[i] = sum;
  }
}
template <bool kTurned> static void ldmatrix(uint32_t** out, int n, unsigned address) {
  shared_at(address, 16, 16, "ldmatrix");
  auto* table = share(&address, 1);
  for (int m = 0; m < n; m++) {
    if (!kTurned) {
      memcpy(out[m], now->cta->shared + table[m * 8 + lane() / 4][0] + (lane() % 4) * 4, 4);
      continue;
    }
    for (int j = 0; j < 2; j++)  // rows 2l and 2l+1 of a column
      memcpy((uint8_t*)out[m] + 2 * j, now->cta->shared + table[m * 8 + lane() % 4 * 2 + j][0] + (lane() / 4) * 2, 2);
  }
}

// One row of an operand: 32 bytes, k innermost, at a descriptor's place in shared memory.
static void wgmma_row(uint64_t descriptor, int row, bool fp8, float* values) {
  unsigned start = (descriptor & 0x3fff) << 4, stride = ((descriptor >> 32) & 0x3fff) << 4;
  if (descriptor >> 62 != 1) fail("a wgmma descriptor whose layout is not the 128-byte swizzle");
  unsigned linear = start + (row / 8) * stride + (row % 8) * 128;
  for (int chunk = 0; chunk < 2; chunk++) {
    unsigned at = linear + chunk * 16, place = at ^ (((at >> 7) & 7) << 4);
    const uint32_t* words = (const uint32_t*)shared_at(place, 16, 16, "wgmma");
    for (int i = 0; i < 4; i++)
      for (int j = 0; j < (fp8 ? 4 : 2); j++) *values++ = fp8 ? e4m3_at(words[i], j) : bf16_at(words[i], j);
  }
}
static void wgmma_do(const Wgmma& g) {
  int w = (now->thread.x % 128) / 32, l = lane(), depth = g.fp8 ? 32 : 16;
  float a[2][32], b[32];
  for (int r = 0; r < 2; r++) wgmma_row(g.a, w * 16 + l / 4 + 8 * r, g.fp8, a[r]);
  for (int i = 0; i < g.n / 4; i++)
    for (int j = 0; j < 2; j++) {
      wgmma_row(g.b, i * 8 + (l % 4) * 2 + j, g.fp8, b);
      for (int r = 0; r < 2; r++) {
        float& d = *g.d[i * 4 + r * 2 + j];
        float sum = g.keep ? d : 0.f;
        for (int k = 0; k < depth; k++) sum += a[r][k] * b[k];
        d = sum;
      }
    }
}
static void wgmma(const Wgmma& g) {
  if (lazy) now->wgmma_groups.back().push_back(g);
  else wgmma_do(g);
}
static void wgmma_commit() {
  if (lazy) now->wgmma_groups.push_back({});
}
static void wgmma_wait(int left) {
  auto& queue = now->wgmma_groups;
  while ((int)queue.size() - 1 > left) {
    for (auto& g : queue.front()) wgmma_do(g);
    queue.erase(queue.begin());
  }
  warp_barrier();
}

static void (*body)(void**);
static void** arguments;
static void enter() {
  body(arguments);
  if (!now->open.empty() || !now->groups.empty())
    for (auto& g : now->groups)
      if (!g.empty()) fail("it ended with copies in flight that nothing waits for");
  now->done = true;
  now->cta->alive--;
  progress = true;
  _longjmp(scheduler, 1);
}

static uint32_t random_state;
static uint32_t next_random() {
  random_state = random_state * 1664525u + 1013904223u;
  return random_state >> 8;
}

// Who runs after whom, as blocks of warps of threads. All threads in turn in a shuffled order (one block of one warp); or
// warp by warp and block by block, each as far as it can get before the next one begins: what a thread writes too early
// or reads too soon then meets threads that are far behind.
using Turns = std::vector<std::vector<std::vector<int>>>;
static Turns turns(size_t count, int threads, bool eager) {
  Turns blocks;
  auto shuffle = [](auto& items) {
    for (size_t i = items.size(); i > 1; i--) std::swap(items[i - 1], items[next_random() % i]);
  };
  for (size_t i = 0; i < count; i++) {
    if (blocks.empty() || (eager && (int)i % threads == 0)) blocks.emplace_back();
    if (blocks.back().empty() || (eager && (int)i % threads % kWarp == 0)) blocks.back().emplace_back();
    blocks.back().back().push_back((int)i);
  }
  for (auto& block : blocks) {
    for (auto& warp : block) shuffle(warp);
    shuffle(block);
  }
  shuffle(blocks);
  return blocks;
}
// Lets a thread run until it waits or ends. Returns false on failure.
static bool resume(Fiber& f) {
  now = &f;
  int code = _setjmp(scheduler);
  if (code == 0) {
    if (f.started) _longjmp(f.state, 1);
    f.started = true;
    setcontext(&f.start);
  }
  return code != 2;
}

// Runs the CTAs first .. first+count-1 of the grid together. Returns false on failure; error_text says why.
static bool run_wave(int first, int count, dim3_ grid, int threads, int dynamic_bytes, bool eager) {
  static std::vector<Fiber> fibers;
  std::vector<Cta> ctas(count);
  fibers.clear();
  fibers.resize((size_t)count * threads);
  for (int c = 0; c < count; c++) {
    Cta& cta = ctas[c];
    int i = first + c;
    cta.block = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
    size_t bytes = kDynamic + kStatic * kStatics + 1024;
    cta.memory.reset(new uint8_t[bytes]);
    memset(cta.memory.get(), 0xff, bytes);  // NaN in every float format
    cta.shared = (uint8_t*)(((uintptr_t)cta.memory.get() + 1023) / 1024 * 1024);
    cta.dynamic_bytes = dynamic_bytes;
    cta.alive = threads;
    cta.exchange.assign((size_t)2 * threads * 8, 0);
    for (int t = 0; t < threads; t++) {
      Fiber& f = fibers[(size_t)c * threads + t];
      f.cta = &cta;
      f.thread = {t, 0, 0};
      f.stack.reset(new char[kStackBytes]);
      getcontext(&f.start);
      f.start.uc_stack.ss_sp = f.stack.get();
      f.start.uc_stack.ss_size = kStackBytes;
      f.start.uc_link = nullptr;
      makecontext(&f.start, enter, 0);
    }
  }
  auto blocks = turns(fibers.size(), threads, eager);
  for (size_t left = fibers.size(); left;) {
    bool any = false;
    for (auto& block : blocks) {
      bool again;
      do {
        again = false;
        for (auto& warp : block) do {
            progress = false;
            for (int i : warp) {
              if (fibers[i].done) continue;
              if (!resume(fibers[i])) return false;
              left -= fibers[i].done;
            }
            again |= progress;
          } while (progress && eager);
        any |= again;
      } while (again && eager);
    }
    if (any || !left) continue;
    for (auto& f : fibers)
      if (!f.done) { now = &f; break; }
    snprintf(error_text, sizeof error_text, "block (%d,%d) thread %d: deadlock, it waits for %s", now->cta->block.x,
             now->cta->block.y, now->thread.x, waiting_for);
    return false;
  }
  for (auto& cta : ctas)
    for (int i = 0; i < kGuard && dynamic_bytes + i < kDynamic; i++)
      if (cta.shared[dynamic_bytes + i] != 0xff) {
        snprintf(error_text, sizeof error_text, "block (%d,%d): wrote shared memory %d bytes past the %d of the launch",
                 cta.block.x, cta.block.y, i, dynamic_bytes);
        return false;
      }
  return true;
}

static const char* launch(void (*kernel)(void**), void** args, const int* grid, int threads, int dynamic_bytes, int is_lazy,
                          int seed, int wave) {
  body = kernel;
  arguments = args;
  num_threads = threads;
  lazy = is_lazy;
  failed = false;
  random_state = seed;
  dim3_ g{grid[0], grid[1], grid[2]};
  int total = g.x * g.y * g.z;
  if (wave <= 0) wave = total;
  for (int first = 0; first < total; first += wave)
    if (!run_wave(first, std::min(wave, total - first), g, threads, dynamic_bytes, seed % 2 == 0)) return error_text;
  return nullptr;
}
}  // namespace emu

#define threadIdx (emu::now->thread)
#define blockIdx (emu::now->cta->block)

static inline uint64_t __cvta_generic_to_shared(const void* p) { return emu::address_of_shared(p); }
static inline void __syncthreads() {
  if (emu::now->cta->alive != emu::num_threads) emu::fail("__syncthreads after a thread of the block has ended");
  emu::barrier(emu::now->cta->all, emu::num_threads, "__syncthreads");
}
static inline void __syncwarp(uint = 0xffffffffu) { emu::warp_barrier(); }
template <class T> static inline T __shfl_sync(uint64_t mask, T v, int source, int = 32) { return emu::shuffle(mask, v, source); }
template <class T> static inline T __shfl_xor_sync(uint64_t mask, T v, int x, int = 32) {
  return emu::shuffle(mask, v, emu::lane() ^ x);
}
template <class T> static inline T __shfl_up_sync(uint64_t mask, T v, int d, int = 32) {
  return emu::shuffle(mask, v, emu::lane() < d ? emu::lane() : emu::lane() - d);
}
template <class T> static inline T __shfl_down_sync(uint64_t mask, T v, int d, int = 32) {
  return emu::shuffle(mask, v, emu::lane() + d > 31 ? emu::lane() : emu::lane() + d);
}
static inline uint __match_any_sync(uint, int v) {
  uint32_t word = (uint32_t)v, mask = 0;
  auto* table = emu::share(&word, 1);
  for (int i = 0; i < emu::kWarp; i++) mask |= (uint)(table[i][0] == word) << i;
  return mask;
}
static inline uint __ballot_sync(uint, int v) {
  uint32_t word = v != 0, mask = 0;
  auto* table = emu::share(&word, 1);
  for (int i = 0; i < emu::kWarp; i++) mask |= table[i][0] << i;
  return mask;
}
static inline int __reduce_max_sync(uint, int v) {
  auto* table = emu::share((uint32_t*)&v, 1);
  for (int i = 0; i < emu::kWarp; i++) v = std::max(v, (int)table[i][0]);
  return v;
}
static inline int __reduce_min_sync(uint, int v) {
  auto* table = emu::share((uint32_t*)&v, 1);
  for (int i = 0; i < emu::kWarp; i++) v = std::min(v, (int)table[i][0]);
  return v;
}
static inline int __popc(uint v) { return __builtin_popcount(v); }
static inline int __ffs(int v) { return __builtin_ffs(v); }
template <class T> static inline T atomicAdd(T* p, T v) {
  T old = *p;
  *p = old + v;
  emu::progress = true;
  return old;
}
static inline float __int_as_float(int v) { float f; memcpy(&f, &v, 4); return f; }
static inline int __float_as_int(float v) { int i; memcpy(&i, &v, 4); return i; }
static inline uint __float_as_uint(float v) { uint i; memcpy(&i, &v, 4); return i; }
static inline float __uint_as_float(uint v) { float f; memcpy(&f, &v, 4); return f; }
static inline float rsqrtf(float v) { return 1.f / std::sqrt(v); }
static inline void __threadfence() {}
template <class T> static inline T __ldcg(const T* p) { return *p; }
