// A plugin for plugin_test.cc, without a GPU. FAKE_... makes one that is wrong in one way.
#include <cstdio>
#include <cstdlib>

#include "flashomni/attention.h"
#include "flashomni/plugin.h"

namespace {

using namespace flashomni;

#ifndef FAKE_SYMBOL
#define FAKE_SYMBOL flashomni_plugin
#endif

int32_t refuse(PluginStatus* status, ErrorKind kind, const char* message) {
  status->kind = kind;
  std::snprintf(status->message, sizeof(status->message), "%s", message);
  return 1;
}

int32_t serves(int32_t device_id, PluginStatus* status) {
  if (device_id < 2) return 0;
  return refuse(status, ErrorKind::kNotImplemented, "compute capability 1.0 of device Abacus");
}

int32_t attention_workspace(const AttentionArguments*, const Context*, size_t* bytes, PluginStatus*) {
  *bytes = 192;
  return 0;
}

/// Counts its calls where the stream points to; a scale from 10 on is an error of kind scale - 10.
int32_t attention(const AttentionArguments* arguments, const Context* context, PluginStatus* status) {
  if (arguments->scale >= 10.0f) {
    return refuse(status, static_cast<ErrorKind>(static_cast<int>(arguments->scale) - 10),
                  "scale: too large");
  }
  ++*static_cast<int*>(context->stream);
  return 0;
}

[[maybe_unused]] PluginTable make_table() {
  PluginTable table{};
  table.abi = kPluginAbi;
  table.bytes = sizeof(PluginTable);
  table.name = "cuda_sm90";
  table.sources = "fake";
  table.serves = serves;
  table.attention_workspace = attention_workspace;
  table.attention = attention;
#if defined(FAKE_ABI)
  table.abi = FAKE_ABI;
#elif defined(FAKE_BYTES)
  table.bytes = FAKE_BYTES;
#elif defined(FAKE_NAME)
  table.name = FAKE_NAME;
#endif
  return table;
}

}  // namespace

extern "C" FLASHOMNI_API const flashomni::PluginTable* FAKE_SYMBOL() {
#ifdef FAKE_NOTHING
  return nullptr;
#else
  static const PluginTable table = make_table();
  return &table;
#endif
}
