#include "flashomni/error.h"

namespace flashomni {

const char* Error::kind_name() const {
  switch (kind_) {
    case ErrorKind::kValue:
      return "ValueError";
    case ErrorKind::kType:
      return "TypeError";
    case ErrorKind::kNotImplemented:
      return "NotImplementedError";
    case ErrorKind::kRuntime:
      break;
  }
  return "RuntimeError";
}

void fail(ErrorKind kind, const std::string& argument, const std::string& expected, const std::string& got) {
  throw Error(kind, argument + ": expected " + expected + ", got " + got);
}

}  // namespace flashomni
