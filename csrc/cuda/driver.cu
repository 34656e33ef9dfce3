// The CUDA version of the driver.
#include "check.h"
#include "launches.h"

namespace sparseopt::cuda {

int driver_version() {
  int version = 0;
  check(cudaDriverGetVersion(&version), "asking for the version of the driver");
  return version;
}

}  // namespace sparseopt::cuda
