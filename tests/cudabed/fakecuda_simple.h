/* The part of the driver stand-in that keeps no memory: devices, contexts, streams, host memory, errors.
 * Included at the end of fakecuda.c. */

/* --- devices and contexts ------------------------------------------------------------------- */
API cuInit(unsigned flags) { pthread_once(&once, start); return devices ? OK : CUDA_ERROR_NO_DEVICE; }
API cuDriverGetVersion(int *v) { *v = 13000; return OK; }
API cuDeviceGetCount(int *n) { pthread_once(&once, start); *n = devices; return OK; }
API cuDeviceGet(CUdevice *d, int i) {
    pthread_once(&once, start);
    if (i < 0 || i >= devices) return CUDA_ERROR_INVALID_DEVICE;
    *d = i;
    return OK;
}
API cuDeviceGetName(char *s, int n, CUdevice d) { snprintf(s, n, "Stand-in device"); return OK; }
API cuDeviceGetUuid(CUuuid *u, CUdevice d) { memset(u, 7, sizeof *u); u->bytes[0] = d; return OK; }
API cuDeviceTotalMem(size_t *n, CUdevice d) { pthread_once(&once, start); *n = pool_size; return OK; }
API cuDeviceGetPCIBusId(char *s, int n, CUdevice d) { snprintf(s, n, "0000:%02x:00.0", d + 1); return OK; }
API cuDeviceCanAccessPeer(int *can, CUdevice a, CUdevice b) { *can = a != b; return OK; }
API cuDeviceGetAttribute(int *v, CUdevice_attribute a, CUdevice d) {
    switch (a) {
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING: *v = 1; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *v = 9; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *v = 4; break;
    case CU_DEVICE_ATTRIBUTE_PCI_BUS_ID: *v = d + 1; break;
    default: *v = 0;
    }
    return OK;
}
API cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { *c = (CUcontext)&contexts[d]; return OK; }
API cuDevicePrimaryCtxRelease(CUdevice d) { return OK; }
API cuDevicePrimaryCtxGetState(CUdevice d, unsigned *flags, int *active) { *flags = 0; *active = 1; return OK; }
API cuCtxGetCurrent(CUcontext *c) { *c = current[depth]; return OK; }
API cuCtxSetCurrent(CUcontext c) { current[depth] = c; return OK; }
API cuCtxPushCurrent(CUcontext c) {
    if (depth == 15) return CUDA_ERROR_INVALID_CONTEXT;
    current[++depth] = c;
    return OK;
}
API cuCtxPopCurrent(CUcontext *c) {
    if (c) *c = current[depth];
    if (depth) depth--;
    else current[0] = NULL;
    return OK;
}
API cuCtxGetDevice(CUdevice *d) { *d = ordinal_now(); return current[depth] ? OK : CUDA_ERROR_INVALID_CONTEXT; }
API cuCtxGetId(CUcontext c, unsigned long long *id) { *id = 1 + ((int *)c - contexts); return OK; }
API cuCtxSetFlags(unsigned flags) { return OK; }
API cuCtxGetFlags(unsigned *flags) { *flags = 0; return OK; }
API cuCtxSynchronize(void) { return OK; }
API cuCtxGetStreamPriorityRange(int *least, int *greatest) { *least = *greatest = 0; return OK; }

/* --- host memory: one address for CPU and device -------------------------------------------- */
API cuMemHostRegister(void *p, size_t n, unsigned flags) { return OK; }
API cuMemHostUnregister(void *p) { return OK; }
API cuMemHostGetDevicePointer(CUdeviceptr *d, void *p, unsigned flags) { *d = A(p); return OK; }
API cuMemHostAlloc(void **p, size_t n, unsigned flags) { *p = malloc(n); return *p ? OK : CUDA_ERROR_OUT_OF_MEMORY; }
API cuMemAllocHost(void **p, size_t n) { return cuMemHostAlloc(p, n, 0); }
API cuMemFreeHost(void *p) { free(p); return OK; }
API cuMemRetainAllocationHandle(CUmemGenericAllocationHandle *h, void *p) { return CUDA_ERROR_INVALID_VALUE; }
API cuPointerSetAttribute(const void *v, CUpointer_attribute a, CUdeviceptr p) { return OK; }

/* --- streams and events: all work is done when it is asked for ------------------------------ */
API cuStreamCreate(CUstream *s, unsigned flags) { *s = (CUstream)&stream_object; return OK; }
API cuStreamCreateWithPriority(CUstream *s, unsigned flags, int p) { return cuStreamCreate(s, flags); }
API cuStreamDestroy(CUstream s) { return OK; }
API cuStreamSynchronize(CUstream s) { return OK; }
API cuStreamQuery(CUstream s) { return OK; }
API cuStreamWaitEvent(CUstream s, CUevent e, unsigned flags) { return OK; }
API cuStreamAddCallback(CUstream s, CUstreamCallback f, void *data, unsigned flags) { f(s, OK, data); return OK; }
API cuLaunchHostFunc(CUstream s, CUhostFn f, void *data) { f(data); return OK; }
API cuEventCreate(CUevent *e, unsigned flags) { *e = (CUevent)&event_object; return OK; }
API cuEventDestroy(CUevent e) { return OK; }
API cuEventRecord(CUevent e, CUstream s) { return OK; }
API cuEventQuery(CUevent e) { return OK; }
API cuEventSynchronize(CUevent e) { return OK; }
API cuIpcGetEventHandle(CUipcEventHandle *h, CUevent e) { memset(h, 0, sizeof *h); return OK; }
API cuIpcOpenEventHandle(CUevent *e, CUipcEventHandle h) { *e = (CUevent)&event_object; return OK; }

/* --- errors, and functions by name ---------------------------------------------------------- */
API cuGetErrorString(CUresult e, const char **s) { *s = e ? "an error of the driver stand-in" : "no error"; return OK; }
API cuGetErrorName(CUresult e, const char **s) {
    *s = e == OK ? "CUDA_SUCCESS" : e == CUDA_ERROR_OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY"
       : e == CUDA_ERROR_INVALID_VALUE ? "CUDA_ERROR_INVALID_VALUE" : "CUDA_ERROR_UNKNOWN";
    return OK;
}
API cuGetProcAddress(const char *name, void **f, int version, cuuint64_t flags, CUdriverProcAddressQueryResult *found) {
    char newer[128];
    snprintf(newer, sizeof newer, "%s_v2", name);
    *f = dlsym(RTLD_DEFAULT, newer);
    if (!*f) *f = dlsym(RTLD_DEFAULT, name);
    if (found) *found = *f ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return *f ? OK : CUDA_ERROR_NOT_FOUND;
}
