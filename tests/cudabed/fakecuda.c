/* A stand-in for the CUDA driver (libcuda.so.1) whose device memory is host memory.
 *
 * An MPI library that knows GPUs runs its device-buffer paths on it, on a machine without any.
 * Device addresses lie in one reserved range without access rights, so a plain load or store by the
 * CPU faults as it does on a real device pointer. The bytes lie in one memory file, mapped a second
 * time (the shadow); only the copy functions here and fakecuda_shadow() lead there. All streams of
 * the driver run at once. Memory handles (IPC) work between the processes of one machine.
 *
 * Environment: FAKECUDA_TOTAL_MIB  memory of the device, per process  [8192]
 *              FAKECUDA_DEVICES    devices that exist                 [1]
 *              FAKECUDA_REPORT     if set, each process says at its end what it copied
 *              CUDA_VISIBLE_DEVICES  as for the real driver: how many entries, so many devices
 */
#define _GNU_SOURCE
#include <cuda.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define OK CUDA_SUCCESS
#define EXPORT __attribute__((visibility("default")))
#define API EXPORT CUresult CUDAAPI
#define GRAIN 4096ul /* allocations are whole pages: IPC maps pages */
#define DEVICES 16

/* A block of device memory: one of the own pool, or one of another process that was opened here. */
typedef struct block {
    unsigned char *device;
    size_t size, mapped;
    ptrdiff_t to_shadow;
    unsigned long long id;
    int ordinal, imported;
    struct block *next;
} block_t;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static block_t *own, *opened; /* own: by rising address */
static unsigned char *pool, *pool_shadow;
static size_t pool_size, pool_used;
static int pool_file = -1, devices;
static unsigned long long next_id = 1;
static unsigned long copies, copied_bytes, ipc_opens;
static int contexts[DEVICES], stream_object, event_object;
static __thread CUcontext current[16];
static __thread int depth;

static size_t pages(size_t n) { return (n + GRAIN - 1) & ~(GRAIN - 1); }

static void start(void) {
    const char *total = getenv("FAKECUDA_TOTAL_MIB"), *count = getenv("FAKECUDA_DEVICES");
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    pool_size = (total ? strtoull(total, NULL, 10) : 8192) << 20;
    devices = count ? atoi(count) : 1;
    if (devices > DEVICES) devices = DEVICES;
    if (visible) {
        int listed = *visible != 0;
        for (; *visible; visible++) listed += *visible == ',';
        if (listed < devices) devices = listed;
    }
    pool_file = syscall(SYS_memfd_create, "fakecuda", 1 /* MFD_CLOEXEC */);
    if (pool_file < 0 || ftruncate(pool_file, pool_size)) { perror("fakecuda: memory file"); abort(); }
    pool_shadow = mmap(NULL, pool_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, pool_file, 0);
    pool = mmap(NULL, pool_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pool == MAP_FAILED || pool_shadow == MAP_FAILED) { perror("fakecuda: address range"); abort(); }
}

__attribute__((destructor)) static void report(void) {
    if (getenv("FAKECUDA_REPORT"))
        fprintf(stderr, "fakecuda pid %d: %lu copies, %lu bytes, %lu memory handles opened\n", getpid(), copies,
                copied_bytes, ipc_opens);
}

/* --- blocks ----------------------------------------------------------------------------- */
static block_t *search(block_t *b, const unsigned char *p) {
    for (; b; b = b->next)
        if (p >= b->device && p < b->device + b->size) return b;
    return NULL;
}

static block_t *find(CUdeviceptr address) {
    const unsigned char *p = (const unsigned char *)address;
    pthread_once(&once, start);
    pthread_mutex_lock(&lock);
    block_t *b = search(p >= pool && p < pool + pool_size ? own : opened, p);
    pthread_mutex_unlock(&lock);
    return b;
}

/* Where the CPU reaches the n bytes at a device address; NULL where they are not all in one block. */
EXPORT void *fakecuda_shadow(CUdeviceptr address, size_t n) {
    block_t *b = find(address);
    if (!b || n > b->size - (address - (CUdeviceptr)b->device)) return NULL;
    return (unsigned char *)address + b->to_shadow;
}

/* Whether an address lies in the range that device memory is taken from, allocated or not. */
EXPORT int fakecuda_in_pool(CUdeviceptr address) {
    pthread_once(&once, start);
    return address >= (CUdeviceptr)pool && address < (CUdeviceptr)pool + pool_size;
}

/* The same for an operand of a copy, which may be host memory. */
static void *operand(CUdeviceptr address, size_t n) {
    if (fakecuda_in_pool(address) || find(address)) return fakecuda_shadow(address, n);
    return (void *)address;
}

static int ordinal_now(void) {
    char *c = (char *)current[depth];
    return c ? (int)((int *)c - contexts) : 0;
}

API cuMemAlloc(CUdeviceptr *p, size_t n) {
    pthread_once(&once, start);
    if (!n) return CUDA_ERROR_INVALID_VALUE;
    block_t *fresh = calloc(1, sizeof *fresh), **place;
    unsigned char *at = pool;
    fresh->size = n;
    fresh->mapped = pages(n);
    fresh->ordinal = ordinal_now();
    pthread_mutex_lock(&lock);
    for (place = &own; *place && (size_t)((*place)->device - at) < fresh->mapped; place = &(*place)->next)
        at = (*place)->device + (*place)->mapped;
    int fits = fresh->mapped <= (size_t)(pool + pool_size - at);
    if (fits) {
        fresh->device = at;
        fresh->to_shadow = pool_shadow - pool;
        fresh->id = next_id++;
        fresh->next = *place;
        *place = fresh;
        pool_used += fresh->mapped;
    }
    pthread_mutex_unlock(&lock);
    if (!fits) { free(fresh); return CUDA_ERROR_OUT_OF_MEMORY; }
    *p = (CUdeviceptr)at;
    return OK;
}

static block_t *take(block_t **list, CUdeviceptr p) {
    block_t *b;
    pthread_mutex_lock(&lock);
    while ((b = *list) && (CUdeviceptr)b->device != p) list = &b->next;
    if (b) *list = b->next;
    pthread_mutex_unlock(&lock);
    return b;
}

API cuMemFree(CUdeviceptr p) {
    if (!p) return OK;
    block_t *b = take(&own, p);
    if (!b) return CUDA_ERROR_INVALID_VALUE;
    madvise(b->device + b->to_shadow, b->mapped, MADV_REMOVE); /* the machine gets the memory back */
    __atomic_sub_fetch(&pool_used, b->mapped, __ATOMIC_RELAXED);
    free(b);
    return OK;
}

API cuMemGetInfo(size_t *available, size_t *total) {
    pthread_once(&once, start);
    *total = pool_size;
    *available = pool_size - pool_used;
    return OK;
}

API cuMemGetAddressRange(CUdeviceptr *base, size_t *n, CUdeviceptr p) {
    block_t *b = find(p);
    if (!b) return CUDA_ERROR_INVALID_VALUE;
    if (base) *base = (CUdeviceptr)b->device;
    if (n) *n = b->size;
    return OK;
}

API cuPointerGetAttribute(void *value, CUpointer_attribute a, CUdeviceptr p) {
    block_t *b = find(p);
    if (!b) return CUDA_ERROR_INVALID_VALUE;
    switch (a) {
    case CU_POINTER_ATTRIBUTE_CONTEXT: *(CUcontext *)value = (CUcontext)&contexts[b->ordinal]; return OK;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE: *(unsigned *)value = CU_MEMORYTYPE_DEVICE; return OK;
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: *(CUdeviceptr *)value = p; return OK;
    case CU_POINTER_ATTRIBUTE_BUFFER_ID: *(unsigned long long *)value = b->id; return OK;
    case CU_POINTER_ATTRIBUTE_IS_MANAGED: *(unsigned *)value = 0; return OK;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: *(int *)value = b->ordinal; return OK;
    case CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE: *(int *)value = 1; return OK;
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR: *(CUdeviceptr *)value = (CUdeviceptr)b->device; return OK;
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE: *(size_t *)value = b->size; return OK;
    case CU_POINTER_ATTRIBUTE_MAPPED: *(int *)value = 1; return OK;
    case CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES: *(unsigned long long *)value = 0; return OK;
    case CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE: *(void **)value = NULL; return OK;
    case CU_POINTER_ATTRIBUTE_SYNC_MEMOPS: *(int *)value = 1; return OK;
    default: return CUDA_ERROR_NOT_SUPPORTED;
    }
}

API cuPointerGetAttributes(unsigned n, CUpointer_attribute *a, void **value, CUdeviceptr p) {
    for (unsigned i = 0; i < n; i++) {
        if (cuPointerGetAttribute(value[i], a[i], p) == OK) continue;
        int narrow = a[i] == CU_POINTER_ATTRIBUTE_MEMORY_TYPE || a[i] == CU_POINTER_ATTRIBUTE_IS_MANAGED ||
                     a[i] == CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL;
        memset(value[i], 0, narrow ? sizeof(int) : sizeof(void *));
    }
    return OK;
}

/* --- copies --------------------------------------------------------------------------------- */
EXPORT CUresult fakecuda_copy(CUdeviceptr to, CUdeviceptr from, size_t n) {
    void *d = operand(to, n), *s = operand(from, n);
    if (!n) return OK;
    if (!d || !s) return CUDA_ERROR_INVALID_VALUE;
    memmove(d, s, n);
    __atomic_add_fetch(&copies, 1, __ATOMIC_RELAXED);
    __atomic_add_fetch(&copied_bytes, n, __ATOMIC_RELAXED);
    return OK;
}
#define A(p) ((CUdeviceptr)(p))
API cuMemcpy(CUdeviceptr d, CUdeviceptr s, size_t n) { return fakecuda_copy(d, s, n); }
API cuMemcpyAsync(CUdeviceptr d, CUdeviceptr s, size_t n, CUstream q) { return fakecuda_copy(d, s, n); }
API cuMemcpyDtoD(CUdeviceptr d, CUdeviceptr s, size_t n) { return fakecuda_copy(d, s, n); }
API cuMemcpyDtoDAsync(CUdeviceptr d, CUdeviceptr s, size_t n, CUstream q) { return fakecuda_copy(d, s, n); }
API cuMemcpyHtoD(CUdeviceptr d, const void *s, size_t n) { return fakecuda_copy(d, A(s), n); }
API cuMemcpyHtoDAsync(CUdeviceptr d, const void *s, size_t n, CUstream q) { return fakecuda_copy(d, A(s), n); }
API cuMemcpyDtoH(void *d, CUdeviceptr s, size_t n) { return fakecuda_copy(A(d), s, n); }
API cuMemcpyDtoHAsync(void *d, CUdeviceptr s, size_t n, CUstream q) { return fakecuda_copy(A(d), s, n); }
API cuMemcpy2D(const CUDA_MEMCPY2D *c) {
    for (size_t y = 0; y < c->Height; y++) {
        CUdeviceptr s = c->srcMemoryType == CU_MEMORYTYPE_HOST ? A(c->srcHost) : c->srcDevice;
        CUdeviceptr d = c->dstMemoryType == CU_MEMORYTYPE_HOST ? A(c->dstHost) : c->dstDevice;
        CUresult e = fakecuda_copy(d + (y + c->dstY) * c->dstPitch + c->dstXInBytes,
                                   s + (y + c->srcY) * c->srcPitch + c->srcXInBytes, c->WidthInBytes);
        if (e) return e;
    }
    return OK;
}
API cuMemcpy2DAsync(const CUDA_MEMCPY2D *c, CUstream q) { return cuMemcpy2D(c); }
API cuMemsetD8(CUdeviceptr d, unsigned char v, size_t n) {
    void *p = operand(d, n);
    if (!p) return CUDA_ERROR_INVALID_VALUE;
    memset(p, v, n);
    return OK;
}
API cuMemsetD8Async(CUdeviceptr d, unsigned char v, size_t n, CUstream q) { return cuMemsetD8(d, v, n); }

/* --- memory of other processes -------------------------------------------------------------- */
typedef struct { int pid, file, ordinal; size_t offset, size; } handle_t;

API cuIpcGetMemHandle(CUipcMemHandle *h, CUdeviceptr p) {
    block_t *b = find(p);
    if (!b || b->imported) return CUDA_ERROR_INVALID_VALUE;
    handle_t k = {getpid(), pool_file, b->ordinal, (size_t)(b->device - pool), b->size};
    memset(h, 0, sizeof *h);
    memcpy(h, &k, sizeof k);
    return OK;
}

API cuIpcOpenMemHandle(CUdeviceptr *p, CUipcMemHandle h, unsigned flags) {
    handle_t k;
    char path[64];
    memcpy(&k, &h, sizeof k);
    if (k.pid == getpid()) return CUDA_ERROR_INVALID_CONTEXT;
    snprintf(path, sizeof path, "/proc/%d/fd/%d", k.pid, k.file);
    int file = open(path, O_RDWR | O_CLOEXEC);
    if (file < 0) return CUDA_ERROR_INVALID_VALUE;
    size_t mapped = pages(k.size);
    unsigned char *shadow = mmap(NULL, mapped, PROT_READ | PROT_WRITE, MAP_SHARED, file, k.offset);
    unsigned char *device = mmap(NULL, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    close(file);
    if (shadow == MAP_FAILED || device == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
    block_t *b = malloc(sizeof *b);
    pthread_mutex_lock(&lock);
    *b = (block_t){device, k.size, mapped, shadow - device, next_id++, k.ordinal, 1, opened};
    opened = b;
    ipc_opens++;
    pthread_mutex_unlock(&lock);
    *p = (CUdeviceptr)device;
    return OK;
}

API cuIpcCloseMemHandle(CUdeviceptr p) {
    block_t *b = take(&opened, p);
    if (!b) return CUDA_ERROR_INVALID_VALUE;
    munmap(b->device + b->to_shadow, b->mapped);
    munmap(b->device, b->mapped);
    free(b);
    return OK;
}

#include "fakecuda_simple.h"
