// What the library is and whether it runs here.
#include "common.cuh"

namespace {
__global__ void probe() {}
}  // namespace

extern "C" {

int pn2_interface(void) { return PN2_INTERFACE; }

// Whoever asks for the message has the error: the runtime must not report it for the next launch again.
const char* pn2_error(int code) {
    cudaGetLastError();
    return cudaGetErrorString(static_cast<cudaError_t>(code));
}

int pn2_usable(int device) {
    int before = 0;
    cudaError_t error = cudaGetDevice(&before);
    if (error != cudaSuccess) return error;
    if ((error = cudaSetDevice(device)) != cudaSuccess) return error;
    cudaFuncAttributes attributes;  // fails where the library holds no code that this GPU or its driver can run
    error = cudaFuncGetAttributes(&attributes, probe);
    cudaSetDevice(before);
    return error;
}

}  // extern "C"
