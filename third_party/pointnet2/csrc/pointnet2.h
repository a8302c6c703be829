/* The point operations behind one C interface, implemented twice: for CUDA (*.cu) and for the CPU (cpu.cpp).
 *
 * Both libraries export the same functions and know nothing of torch, so one build serves every torch and Python.
 * All arrays are contiguous and live where the library computes. The caller checks arguments and allocates outputs.
 *
 *   context    CUDA: the cudaStream_t to launch on; nothing waits for the device. CPU: the number of threads.
 *   workspace  scratch memory of at least the bytes that the function's `_workspace` names, 16-byte aligned,
 *              its content undefined before and after. May be null where that is 0.
 *   returns    0, or a code for pn2_error: nothing was computed then. PN2_BAD_INDEX: an index lies outside the points
 *              (the CPU looks first; on a GPU a device-side assertion fails instead).
 *
 * Squared distances are (dx*dx + dy*dy) + dz*dz with every operation rounded to float32 and none fused, so that both
 * libraries and the plain-torch reference select the same indices.
 *
 * B scenes, N points, M centres (or known points), S samples of a ball, C channels, P positions to gather.
 */
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define PN2_EXPORT __attribute__((visibility("default")))

enum { PN2_BAD_INDEX = -1 };

/* Element types of features. */
enum { PN2_FLOAT32 = 0, PN2_FLOAT16 = 1, PN2_BFLOAT16 = 2 };

/* Increased with every change of this interface; a library of another version is not used. */
#define PN2_INTERFACE 1
PN2_EXPORT int pn2_interface(void);

/* What a non-zero return code means; a static string. */
PN2_EXPORT const char* pn2_error(int code);

/* 0 if this library can compute on the given device (CUDA device index; ignored on the CPU), else a code. */
PN2_EXPORT int pn2_usable(int device);

/* points [B, N, 3] -> idx [B, M]: the walk starts at 0 and takes the point whose distance to the chosen ones is
 * largest, the lowest index on ties. N >= 1. */
PN2_EXPORT int64_t pn2_furthest_point_sample_workspace(int64_t B, int64_t N, int64_t M);
PN2_EXPORT int pn2_furthest_point_sample(const float* points, int64_t B, int64_t N, int64_t M, int32_t* idx,
                                         void* workspace, intptr_t context);

/* points [B, N, 3], centers [B, M, 3] -> idx [B, M, S]: the first S points in index order with squared distance
 * < radius * radius (float32), padded with the first hit; zeros without any hit. N >= 1, S >= 1. */
PN2_EXPORT int64_t pn2_ball_query_workspace(int64_t B, int64_t N, int64_t M, int64_t S);
PN2_EXPORT int pn2_ball_query(const float* points, const float* centers, int64_t B, int64_t N, int64_t M, int64_t S,
                              float radius, int32_t* idx, void* workspace, intptr_t context);

/* query [B, N, 3], points [B, M, 3] -> distance [B, N, 3] (Euclidean, ascending), idx [B, N, 3]; the lower index
 * first on ties; with M < 3 the missing ones have index 0 and distance infinity. M >= 1. */
PN2_EXPORT int64_t pn2_three_nn_workspace(int64_t B, int64_t N, int64_t M);
PN2_EXPORT int pn2_three_nn(const float* query, const float* points, int64_t B, int64_t N, int64_t M, float* distance,
                            int32_t* idx, void* workspace, intptr_t context);

/* features [B, C, N], idx [B, P] -> out [B, C, P]: a copy of elements of `element_size` (1, 2, 4 or 8) bytes. */
PN2_EXPORT int pn2_group(const void* features, const int32_t* idx, int64_t B, int64_t C, int64_t N, int64_t P,
                         int element_size, void* out, intptr_t context);

/* grad [B, C, P] of type `dtype`, idx [B, P] -> sums [B, C, N] in float32, given as zeros. */
PN2_EXPORT int pn2_group_backward(const void* grad, const int32_t* idx, int64_t B, int64_t C, int64_t N, int64_t P,
                                  int dtype, float* sums, intptr_t context);

/* features [B, C, M], idx and weight [B, N, 3] -> out [B, C, N] = (f0*w0 + f1*w1) + f2*w2, computed in float32. */
PN2_EXPORT int pn2_interpolate(const void* features, const int32_t* idx, const float* weight, int64_t B, int64_t C,
                               int64_t M, int64_t N, int dtype, void* out, intptr_t context);

/* grad [B, C, N] and features [B, C, M] of type `dtype` -> grad_features [B, C, M] in float32, given as zeros, and
 * grad_weight [B, N, 3], also given as zeros. Either output may be null. */
PN2_EXPORT int pn2_interpolate_backward(const void* grad, const void* features, const int32_t* idx,
                                        const float* weight, int64_t B, int64_t C, int64_t M, int64_t N, int dtype,
                                        float* grad_features, float* grad_weight, intptr_t context);

/* points [B, N, 3], centers [B, M, 3], features [B, N, F] (null where F is 0) of type `dtype`, idx [B, M, K]
 * -> out [B, M, K, 3 + F] of type `dtype`: (point - centre) / radius in float32, then the point's features. */
PN2_EXPORT int pn2_group_offsets(const float* points, const float* centers, const void* features, const int32_t* idx,
                                 int64_t B, int64_t N, int64_t M, int64_t K, int64_t F, float radius, int dtype,
                                 void* out, intptr_t context);

/* grad [B, M, K, 3 + F] of type `dtype` -> grad_points [B, N, 3], grad_centers [B, M, 3] and grad_features [B, N, F],
 * all float32 and given as zeros; each may be null. */
PN2_EXPORT int pn2_group_offsets_backward(const void* grad, const int32_t* idx, int64_t B, int64_t N, int64_t M,
                                          int64_t K, int64_t F, float radius, int dtype, float* grad_points,
                                          float* grad_centers, float* grad_features, intptr_t context);

#ifdef __cplusplus
}
#endif
