// SPDX-License-Identifier: Apache-2.0
//
// The one exception type of the native code, and the check that throws it with the values in the message.
//
// Nothing here is inline: kernel files are compiled for several instruction sets, and an inline function
// compiled for one of them could be the copy that the linker keeps for all.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace fs {

class Error : public std::runtime_error {
 public:
  explicit Error(const std::string& message);
  ~Error() override;
};

// Collects a message piece by piece; throw_error() throws it as fs::Error.
class Message {
 public:
  Message();
  ~Message();
  Message(const Message&) = delete;
  Message& operator=(const Message&) = delete;

  Message& operator<<(const char* text);
  Message& operator<<(const std::string& text);
  Message& operator<<(bool value);
  Message& operator<<(int value);
  Message& operator<<(unsigned value);
  Message& operator<<(long value);
  Message& operator<<(unsigned long value);
  Message& operator<<(long long value);
  Message& operator<<(unsigned long long value);
  Message& operator<<(double value);

  [[noreturn]] void throw_error() const;

 private:
  std::string* text_;  // a pointer, so that no inline std::string code lands in kernel objects
};

}  // namespace fs

// FS_CHECK(a < b, "a is " << a << "; must be below " << b)
#define FS_CHECK(condition, message)  \
  do {                                \
    if (!(condition)) [[unlikely]] {  \
      ::fs::Message fs_check_message; \
      fs_check_message << message;    \
      fs_check_message.throw_error(); \
    }                                 \
  } while (false)
