/* The runtime of a kernel library: what TVM's generated code calls, with no TVM behind it.
 *
 * TVM's code reaches its runtime through weak pointer variables (__TVMBackend*).  They are defined here, hidden, so
 * that every library carries its own and a TVM that happens to be loaded in the same process cannot replace them.
 * Parallel loops run on the OpenMP pool that the process already has (torch's), so there is never a second pool:
 * GOMP_parallel is looked up among the loaded libraries (libgomp, libiomp5 and libomp all export it).
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <link.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <tvm/ffi/c_api.h>
#include <unistd.h>

#define HIDDEN __attribute__((visibility("hidden")))
#define EXPORT __attribute__((visibility("default")))

typedef struct {
  void* sync_handle;
  int32_t num_task;
} LaunchEnv;
typedef int (*LaunchBody)(int task_id, LaunchEnv* env, void* closure);

/* ---- the OpenMP library of this process ---- */
typedef void (*GompParallel)(void (*)(void*), void*, unsigned, unsigned);
static GompParallel gomp_parallel;
static int (*omp_max_threads)(void);
static int (*omp_inside_parallel)(void);

static int find_openmp(struct dl_phdr_info* info, size_t size, void* unused) {
  (void)size, (void)unused;
  const char* name = info->dlpi_name ? strrchr(info->dlpi_name, '/') : NULL;
  if (!name || (strncmp(name, "/libgomp", 8) && strncmp(name, "/libiomp5", 9) && strncmp(name, "/libomp", 7))) return 0;
  void* lib = dlopen(info->dlpi_name, RTLD_NOW | RTLD_NOLOAD);
  if (!lib) return 0;
  gomp_parallel = (GompParallel)dlsym(lib, "GOMP_parallel");
  omp_max_threads = (int (*)(void))dlsym(lib, "omp_get_max_threads");
  omp_inside_parallel = (int (*)(void))dlsym(lib, "omp_in_parallel");
  return gomp_parallel && omp_max_threads && omp_inside_parallel;
}

__attribute__((constructor)) static void on_load(void) {
  if (!dl_iterate_phdr(find_openmp, NULL)) gomp_parallel = NULL;
}

static __thread int32_t thread_limit; /* of the loops that this thread starts; 0: none */

/* Bounds the threads of the parallel loops started from here on this thread, for work too small to share; 0 lifts it. */
HIDDEN int32_t moec_limit_threads(int32_t most) {
  thread_limit = most;
  return 0;
}

/* Threads that a parallel loop started now would get. */
HIDDEN int32_t moec_num_threads(void) {
  if (!gomp_parallel || thread_limit == 1 || omp_inside_parallel()) return 1;
  int n = omp_max_threads();
  if (thread_limit > 0 && n > thread_limit) n = thread_limit;
  return n < 1 ? 1 : n;
}

/* ---- parallel loops ---- */
/* A loop is cut into this many times more tasks than threads and the threads fetch them one by one, so a thread that
 * the system takes away for a while does not hold up the others. */
enum { TASKS_PER_THREAD = 8 };

typedef struct {
  LaunchBody body;
  void* closure;
  int32_t num_task;
  int32_t next_task;
  int32_t failed;
} Launch;

static void run_tasks(void* data) {
  Launch* launch = data;
  LaunchEnv env = {NULL, launch->num_task};
  for (;;) {
    int32_t task = __atomic_fetch_add(&launch->next_task, 1, __ATOMIC_RELAXED);
    if (task >= launch->num_task) return;
    if (launch->body(task, &env, launch->closure)) __atomic_store_n(&launch->failed, 1, __ATOMIC_RELAXED);
  }
}

static int parallel_launch(LaunchBody body, void* closure, int num_task) {
  int threads = moec_num_threads();
  if (threads == 1) {
    LaunchEnv env = {NULL, 1};
    return body(0, &env, closure);
  }
  Launch launch = {body, closure, num_task > 0 ? num_task : threads * TASKS_PER_THREAD, 0, 0};
  gomp_parallel(run_tasks, &launch, (unsigned)threads, 0);
  return launch.failed ? -1 : 0;
}

static void* alloc_workspace(int device_type, int device_id, uint64_t nbytes, int dtype_code, int dtype_bits) {
  (void)device_type, (void)device_id, (void)dtype_code, (void)dtype_bits;
  void* block = NULL;
  return posix_memalign(&block, 64, nbytes) ? NULL : block;
}

static int free_workspace(int device_type, int device_id, void* block) {
  (void)device_type, (void)device_id;
  free(block);
  return 0;
}

HIDDEN void* __TVMBackendParallelLaunch = (void*)parallel_launch;
HIDDEN void* __TVMBackendAllocWorkspace = (void*)alloc_workspace;
HIDDEN void* __TVMBackendFreeWorkspace = (void*)free_workspace;

/* ---- calls from Python, through tvm-ffi ---- */
static int give_int(TVMFFIAny* result, int64_t value) {
  memset(result, 0, sizeof *result);
  result->type_index = kTVMFFIInt;
  result->v_int64 = value;
  return 0;
}

/* moec_num_threads() -> threads of the OpenMP pool, 0 when no OpenMP library is loaded. */
EXPORT int __tvm_ffi_moec_num_threads(void* self, const TVMFFIAny* args, int32_t num_args, TVMFFIAny* result) {
  (void)self, (void)args, (void)num_args;
  return give_int(result, gomp_parallel ? moec_num_threads() : 0);
}

/* moec_request_amx() -> 0, or the errno with which the kernel refused the AMX tile registers. */
EXPORT int __tvm_ffi_moec_request_amx(void* self, const TVMFFIAny* args, int32_t num_args, TVMFFIAny* result) {
  (void)self, (void)args, (void)num_args;
  enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
  long rc = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
  return give_int(result, rc == 0 ? 0 : errno);
}
