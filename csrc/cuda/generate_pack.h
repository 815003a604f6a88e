// From a network as PyTorch holds it to what the loop on a GPU reads, and whether the loop takes it at all.
#pragma once

#include <string>
#include <vector>

#include "../generation.h"
#include "generate.h"

namespace fr::cuda {

NetworkSizes sizes_of(Cell cell, int64_t L, int64_t H, int64_t V, Precision precision);
// What a GPU has for the loop. Throws std::runtime_error where CUDA fails.
GenerateDevice generate_device(int device);
// A device with so much shared memory in a CTA, whose clusters have up to so many of them.
GenerateDevice device_with(int64_t shared_limit, int64_t cluster);
int64_t largest_cluster(const GenerateDevice& has);
// Why a network does not run on such a device, or nothing; and what runs it: "cta", "cluster" or "steps".
std::string refuse_network(const NetworkSizes& n, const GenerateDevice& has);
std::string way_of(const NetworkSizes& n, const GenerateDevice& has);
// The blob for that plan.cluster, of generate_plan.h where it is 0, else of generate_cluster_plan.h; up to the table.
std::vector<uint32_t> pack_blob(const NetworkWeights& from, Precision precision, int64_t cluster);
// The weights of the first layer's input, (E, gates, units).
std::vector<float> pack_first(const NetworkWeights& from, const NetworkSizes& n);

// The table of a blob, all in the GPU's memory: each number one chain of fma from the bias in the order of E.
struct TableCall {
  int64_t V, E, columns;  // columns: gates * units
  const float* inputs;    // (V, E), or null: one-hot, E = V
  const float* weights;   // (E, columns)
  const float* bias;      // (columns,)
  float* table;           // out (V, columns)
};
// Begins to make it on a stream (a cudaStream_t); the launch's cudaError_t. In generate_table.cu.
int make_table(const TableCall& call, void* stream);

}  // namespace fr::cuda
