// The backend table: one row a backend, in priority order.
#include "flashomni/backend.h"

#include <cstdlib>
#include <string_view>

#include "flashomni/error.h"
#include "src/cpu/cpu.h"

namespace flashomni {
namespace {

constexpr const Backend& (*kTable[])() = {cpu_backend};

/// FLASHOMNI_BACKEND, or empty.
std::string_view forced_name() {
  const char* forced = std::getenv("FLASHOMNI_BACKEND");
  return forced == nullptr ? std::string_view() : std::string_view(forced);
}

std::string all_names() {
  std::string names;
  for (const auto row : kTable) names += text(names.empty() ? "" : ", ", row().name);
  return names;
}

}  // namespace

const Backend& backend_for(Device device) {
  const std::string_view forced = forced_name();
  std::string reasons;
  for (const auto row : kTable) {
    const Backend& backend = row();
    if (!forced.empty() && forced != backend.name) continue;
    std::string reason;
    if (backend.serves(device, &reason)) return backend;
    reasons += text(reasons.empty() ? "" : "; ", backend.name, ": ", reason);
  }
  if (!forced.empty() && reasons.empty()) {
    fail(ErrorKind::kValue, "FLASHOMNI_BACKEND", text("one of ", all_names()), std::string(forced));
  }
  fail(ErrorKind::kNotImplemented, "device",
       forced.empty() ? "a device that a backend serves"
                      : text("a device that FLASHOMNI_BACKEND=", forced, " serves"),
       text(name_of(device), " (", reasons, ")"));
}

std::vector<BackendStatus> backend_statuses() {
  std::vector<BackendStatus> statuses;
  for (const auto row : kTable) {
    const Backend& backend = row();
    BackendStatus status;
    status.name = backend.name;
    status.device = backend.device == DeviceType::kCPU ? "cpu" : "cuda";
    status.serves = backend.serves(Device{backend.device, 0}, &status.reason);
    statuses.push_back(status);
  }
  return statuses;
}

}  // namespace flashomni
