// Marks inline code that the backends share.
#pragma once

#if defined(__CUDACC__)
#define LIL_HOST_DEVICE __host__ __device__
#else
#define LIL_HOST_DEVICE
#endif
