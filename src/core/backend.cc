// The backend table: one row a backend, in priority order.
#include "flashomni/backend.h"

#include <cstdlib>
#include <string_view>

#include "flashomni/error.h"
#include "src/core/plugin.h"
#include "src/cpu/cpu.h"

namespace flashomni {
namespace {

constexpr const Backend& (*kTable[])() = {cuda_sm90_backend, cpu_backend};

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
  const auto asked = [&](const Backend& backend) { return forced.empty() || forced == backend.name; };
  for (const auto row : kTable) {
    if (asked(row()) && row().serves(device, nullptr)) return row();
  }
  std::string reasons;
  for (const auto row : kTable) {
    std::string reason;
    if (!asked(row())) continue;
    if (row().serves(device, &reason)) return row();
    reasons += text(reasons.empty() ? "" : "; ", row().name, ": ", reason);
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
