// For every machine: whatever the compiler makes of it by default.
#define MORAY_TABLE generic_kernels
#include "entry_points.h"
