// SPDX-License-Identifier: Apache-2.0
#include "core/error.h"

#include <memory>
#include <sstream>

namespace fs {

Error::Error(const std::string& message) : std::runtime_error(message) {}
Error::~Error() = default;

Message::Message() : text_(std::make_unique<std::string>().release()) {}
Message::~Message() {
  const std::unique_ptr<std::string> owned(text_);
}

Message& Message::operator<<(const char* text) {
  *text_ += text;
  return *this;
}
Message& Message::operator<<(const std::string& text) {
  *text_ += text;
  return *this;
}
Message& Message::operator<<(bool value) {
  return *this << (value ? "true" : "false");
}
Message& Message::operator<<(int value) {
  return *this << std::to_string(value);
}
Message& Message::operator<<(unsigned value) {
  return *this << std::to_string(value);
}
Message& Message::operator<<(long value) {
  return *this << std::to_string(value);
}
Message& Message::operator<<(unsigned long value) {
  return *this << std::to_string(value);
}
Message& Message::operator<<(long long value) {
  return *this << std::to_string(value);
}
Message& Message::operator<<(unsigned long long value) {
  return *this << std::to_string(value);
}
Message& Message::operator<<(double value) {
  std::ostringstream stream;
  stream << value;
  return *this << stream.str();
}

void Message::throw_error() const {
  throw Error(*text_);
}

}  // namespace fs
