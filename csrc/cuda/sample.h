// The draw on a GPU: what the bindings call and sample.cu does. Pointers of a fr::Sample are into the GPU's memory; a
// launcher returns 0 or the cudaError_t of its launch.
#pragma once

#include <cstdint>

#include "../kernels.h"

namespace fr::cuda {

// Bytes of the GPU's memory that a call needs beside its tensors, 16-byte aligned; often 0.
int64_t sample_scratch_bytes(int64_t B, int64_t V, int64_t mode_of);
// Begins `call` on a stream (a cudaStream_t); its pool is not used.
int sample(const Sample& call, void* scratch, void* stream);

}  // namespace fr::cuda
