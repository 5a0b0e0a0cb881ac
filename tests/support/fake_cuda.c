/* A CUDA driver without a GPU: memory is the host's, a "cubin" is a text that says which kernel to play and how.
 *
 *   moec-fake <role> [wrong] [skip] [hang] [crash] [fail] [us=<microseconds>] <parameter name>...
 *
 * Roles compute what the bundle's kernels compute, by plain loops: gate_up, down, combine, gather. Launch parameters are
 * found by their names, which stand in the text in the launch's order. FAKE_CUDA_LOG: a file that notes every call.
 * Time is what the launches say that they take. ELF files (real cubins) load, and their launches do nothing.
 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MAX_PARAMETERS = 24, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, LAUNCH_FAILED = 719 };
typedef struct {
    char role[16], names[MAX_PARAMETERS][24];
    int count, wrong, skip, hang, crash, fail;
    double us;
} Kernel;
typedef struct { uint64_t address, width, rows; } Map;

static double now_us;
static long long allocated;

static void note(const char *what, long long value) {
    const char *path = getenv("FAKE_CUDA_LOG");
    FILE *file = path ? fopen(path, "a") : NULL;
    if (!file) return;
    fprintf(file, "%s %lld\n", what, value);
    fclose(file);
}
static float wide(uint16_t bits) {
    uint32_t word = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
}
static uint16_t narrow(float value) {
    uint32_t word;
    memcpy(&word, &value, 4);
    if ((word & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return (uint16_t)((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) {
    const char *asked = getenv("FAKE_CUDA_VERSION");
    *version = asked ? atoi(asked) : 13000;
    return 0;
}
int cuGetErrorName(int code, const char **text) {
    *text = code == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY"
            : code == LAUNCH_FAILED ? "CUDA_ERROR_LAUNCH_FAILED" : "CUDA_ERROR_INVALID_VALUE";
    return 0;
}
int cuDeviceGet(int *device, int number) { *device = 0; return 0; }
int cuDeviceGetName(char *name, int length, int device) { snprintf(name, length, "NVIDIA Fake 9000"); return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 16 ? 3 : 1980000;
    return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = context; return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxSynchronize(void) { return 0; }
int cuEventCreate(void **event, unsigned flags) { *event = calloc(1, sizeof(double)); return 0; }
int cuEventRecord(void *event, void *stream) { *(double *)event = now_us; return 0; }
int cuEventSynchronize(void *event) { return 0; }
int cuEventElapsedTime(float *ms, void *start, void *end) {
    *ms = (float)((*(double *)end - *(double *)start) / 1e3);
    return 0;
}
int cuMemAlloc_v2(uint64_t *address, size_t size) {
    const char *most = getenv("FAKE_CUDA_MEMORY");
    allocated += (long long)size;
    if (most && allocated > atoll(most)) return OUT_OF_MEMORY;
    *address = (uint64_t)(uintptr_t)malloc(size);
    return 0;
}
int cuMemFree_v2(uint64_t address) { free((void *)(uintptr_t)address); return 0; }
int cuMemcpyHtoD_v2(uint64_t to, const void *from, size_t size) { memcpy((void *)(uintptr_t)to, from, size); return 0; }
int cuMemcpyDtoH_v2(void *to, uint64_t from, size_t size) { memcpy(to, (void *)(uintptr_t)from, size); return 0; }
int cuMemcpyDtoD_v2(uint64_t to, uint64_t from, size_t size) {
    memcpy((void *)(uintptr_t)to, (void *)(uintptr_t)from, size);
    return 0;
}
int cuMemsetD32_v2(uint64_t address, unsigned word, size_t count) {
    uint32_t *at = (uint32_t *)(uintptr_t)address;
    if (count > (16u << 20)) { note("flush", (long long)count); return 0; }
    for (size_t i = 0; i < count; i++) at[i] = word;
    return 0;
}
int cuTensorMapEncodeTiled(
    Map *map, int type, unsigned rank, void *address, const uint64_t *sizes, const uint64_t *pitch, const unsigned *box,
    const unsigned *steps, int interleave, int swizzle, int promotion, int fill) {
    if ((uintptr_t)map % 64 || rank != 2 || pitch[0] != 2 * sizes[0]) return INVALID_VALUE;
    map->address = (uint64_t)(uintptr_t)address, map->width = sizes[0], map->rows = sizes[1];
    note("map", (long long)sizes[1]);
    return 0;
}
int cuModuleLoadData(void **module, const char *image) {
    Kernel *kernel = calloc(1, sizeof *kernel);
    *module = kernel;
    kernel->us = 50;
    if (!memcmp(image, "\177ELF", 4)) { strcpy(kernel->role, "nothing"); return 0; }
    if (strncmp(image, "moec-fake ", 10)) return INVALID_VALUE;
    char *text = strdup(image), *rest = NULL;
    strtok_r(text, " \n", &rest);
    strncpy(kernel->role, strtok_r(NULL, " \n", &rest), sizeof kernel->role - 1);
    for (char *word; (word = strtok_r(NULL, " \n", &rest));) {
        if (!strcmp(word, "wrong")) kernel->wrong = 1;
        else if (!strcmp(word, "skip")) kernel->skip = 1;
        else if (!strcmp(word, "hang")) kernel->hang = 1;
        else if (!strcmp(word, "crash")) kernel->crash = 1;
        else if (!strcmp(word, "fail")) kernel->fail = 1;
        else if (!strncmp(word, "us=", 3)) kernel->us = atof(word + 3);
        else strncpy(kernel->names[kernel->count++], word, 23);
    }
    free(text);
    return 0;
}
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = module; return 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) {
    note("shared", value);
    return attribute == 8 ? 0 : INVALID_VALUE;
}

static void *found(const Kernel *k, void **parameters, const char *name) {
    for (int i = 0; i < k->count; i++)
        if (!strcmp(k->names[i], name)) return parameters[i];
    return NULL;
}
#define BUFFER(type, name) type *name = found(k, p, #name) ? *(type **)found(k, p, #name) : NULL
#define NUMBER(name) int name = found(k, p, #name) ? *(int *)found(k, p, #name) : 0

static float dot(const uint16_t *a, const uint16_t *b, long depth) {
    float sum = 0;
    for (long i = 0; i < depth; i++) sum += wide(a[i]) * wide(b[i]);
    return sum;
}
static void gemm(const Kernel *k, void **p, int gate_up) {
    BUFFER(uint16_t, x); BUFFER(uint16_t, w); BUFFER(void, y);
    BUFFER(int, slot_order); BUFFER(int, expert_start); BUFFER(int, tile_expert); BUFFER(int, tile_row);
    NUMBER(tiles); NUMBER(slots);
    Map *xm = found(k, p, "x_map"), *wm = found(k, p, "w_map");
    if (xm) x = (uint16_t *)(uintptr_t)xm->address;
    if (wm) w = (uint16_t *)(uintptr_t)wm->address;
    /* sizes that no parameter tells stand in the role's text: depth, columns, rows, per_token, float32 */
    long depth = atol(getenv("FAKE_DEPTH")), columns = atol(getenv("FAKE_COLUMNS"));
    if (!gate_up) { long swap = depth; depth = columns, columns = swap; }
    int per_token = atoi(getenv("FAKE_PER_TOKEN")), rows = 0, splits = 1, narrow_parts = 0;
    for (int i = 0; i < k->count; i++) {
        sscanf(k->names[i], "rows=%d", &rows), sscanf(k->names[i], "splits=%d", &splits);
        if (!strcmp(k->names[i], "bf16")) narrow_parts = 1;
    }
    for (int tile = 0; tile < tiles; tile++) {
        int e = tile_expert[tile];
        if (e < 0) continue;
        for (int row = tile_row[tile]; row < tile_row[tile] + rows && row < expert_start[e + 1]; row++) {
            const uint16_t *xr = x + (long)(gate_up && !xm ? slot_order[row] / per_token : row) * depth;
            for (long c = 0; c < columns; c++) {
                if (k->skip && c == 0) continue;
                const uint16_t *wr = w + ((long)e * columns * (gate_up ? 2 : 1) + c) * depth;
                if (gate_up) {
                    float g = dot(xr, wr, depth), u = dot(xr, wr + columns * depth, depth);
                    ((uint16_t *)y)[row * columns + c] = narrow(g / (1 + expf(-g)) * u * (k->wrong ? 1.3f : 1));
                    continue;
                }
                float sum = dot(xr, wr, depth) * (k->wrong ? 1.3f : 1);
                for (int s = 0; s < splits; s++) {
                    long at = ((long)s * slots + slot_order[row]) * columns + c;
                    if (narrow_parts) ((uint16_t *)y)[at] = narrow(sum / splits);
                    else ((float *)y)[at] = sum / splits;
                }
            }
        }
    }
}
static void combine(const Kernel *k, void **p) {
    BUFFER(void, part); BUFFER(float, weights); BUFFER(uint16_t, y); NUMBER(n);
    long columns = atol(getenv("FAKE_DEPTH"));
    int per_token = atoi(getenv("FAKE_PER_TOKEN")), shared = atoi(getenv("FAKE_SHARED")), splits = 1, narrow_parts = 0;
    for (int i = 0; i < k->count; i++) {
        sscanf(k->names[i], "splits=%d", &splits);
        if (!strcmp(k->names[i], "bf16")) narrow_parts = 1;
    }
    for (long t = 0; t < n; t++)
        for (long c = 0; c < columns; c++) {
            float sum = 0;
            for (int j = 0; j < per_token; j++)
                for (int s = 0; s < splits; s++) {
                    long at = ((long)s * n * per_token + t * per_token + j) * columns + c;
                    float value = narrow_parts ? wide(((uint16_t *)part)[at]) : ((float *)part)[at];
                    sum += value * (j < per_token - shared ? weights[t * (per_token - shared) + j] : 1);
                }
            y[t * columns + c] = narrow(sum);
        }
}
static void gather(const Kernel *k, void **p) {
    BUFFER(uint16_t, x); BUFFER(uint16_t, y); BUFFER(int, slot_order); NUMBER(rows);
    long depth = atol(getenv("FAKE_DEPTH"));
    int per_token = atoi(getenv("FAKE_PER_TOKEN"));
    for (long row = 0; row < rows; row++) memcpy(y + row * depth, x + slot_order[row] / per_token * depth, 2 * depth);
}
int cuLaunchKernel(
    Kernel *k, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void *stream,
    void **parameters, void **extra) {
    note(k->role, gx);
    if (k->hang) sleep(60);
    if (k->crash) abort();
    if (k->fail) return LAUNCH_FAILED;
    now_us += k->us;
    if (!strcmp(k->role, "gate_up")) gemm(k, parameters, 1);
    if (!strcmp(k->role, "down")) gemm(k, parameters, 0);
    if (!strcmp(k->role, "combine")) combine(k, parameters);
    if (!strcmp(k->role, "gather")) gather(k, parameters);
    return 0;
}
