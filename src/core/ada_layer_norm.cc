#include "flashomni/ada_layer_norm.h"

#include "src/core/check.h"

namespace flashomni {

void ada_layer_norm(const AdaLayerNormArguments& a, const Context& context) {
  check::float_tensor(a.x, "x");
  const DType dtype = a.x.dtype;
  const Device device = a.x.device;
  check::tensor(a.x, "x", dtype, device, {check::kAny, check::kAny, check::kAny});
  const int64_t batch = a.x.size(0), width = a.x.size(2);
  check::at_least(width, 1, "columns of x");
  check::tensor(a.scale, "scale", dtype, device, {batch, width});
  check::tensor(a.shift, "shift", dtype, device, {batch, width});
  check::output(a.out, "out", dtype, device, {batch, a.x.size(1), width});
  check::disjoint(a.out, "out", a.x, "x");
  check::disjoint(a.out, "out", a.scale, "scale");
  check::disjoint(a.out, "out", a.shift, "shift");
  check::eps(a.eps);
  check::threads(context);
  const Backend& backend = backend_for(device);
  if (a.x.numel() > 0) backend.ada_layer_norm(a, context);
}

}  // namespace flashomni
