// The table of one instruction set: included last by each isa_*.cpp, which names it.
#include "kernels.h"
#include "layer.h"
#include "mlp.h"
#include "sampling.h"
#include "sums.h"

extern const moray::Kernels moray::MORAY_TABLE = {
    prepare, linear_rows, norm_rows, swiglu, grouped_mlp, attention, latents, add, combine, sampling::sample};
