// Errors: a kind, and a message that names the argument, what was expected and what came.
#pragma once

#include <cstddef>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

#include "flashomni/export.h"

namespace flashomni {

/// What Python sees the error as.
enum class ErrorKind { kValue, kType, kNotImplemented, kRuntime };

/// The only exception that this library throws (and its child below). Thrown before anything is written.
class FLASHOMNI_API Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
  ErrorKind kind() const { return kind_; }
  /// "ValueError", "TypeError", "NotImplementedError" or "RuntimeError".
  const char* kind_name() const;

 private:
  ErrorKind kind_;
};

/// The workspace is too small; thrown before anything is written, so that the call can be made again.
class FLASHOMNI_API WorkspaceError : public Error {
 public:
  WorkspaceError(size_t needed, const std::string& message)
      : Error(ErrorKind::kRuntime, message), needed_(needed) {}
  size_t needed() const { return needed_; }

 private:
  size_t needed_;
};

/// Throws Error(kind, "<argument>: expected <expected>, got <got>").
[[noreturn]] FLASHOMNI_API void fail(ErrorKind kind, const std::string& argument, const std::string& expected,
                                     const std::string& got);

/// Concatenates printable parts, for messages.
template <class... Parts>
std::string text(Parts&&... parts) {
  std::ostringstream stream;
  (stream << ... << std::forward<Parts>(parts));
  return stream.str();
}

}  // namespace flashomni
