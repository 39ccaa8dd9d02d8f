// Just enough JSON to read the vector files: no escapes in strings, whole numbers only.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace ratesync::testing {

struct Json {
  std::int64_t number = 0;  // true is 1
  std::string text;
  std::vector<Json> items;
  std::map<std::string, Json> fields;

  const Json& operator[](const std::string& name) const {
    const auto it = fields.find(name);
    if (it == fields.end()) throw std::runtime_error("no field " + name);
    return it->second;
  }
  [[nodiscard]] bool has(const std::string& name) const { return fields.count(name) != 0; }
};

class JsonReader {
 public:
  explicit JsonReader(std::string text) : text_(std::move(text)) {}
  Json read() {
    switch (next()) {
      case '{': return object();
      case '[': return array();
      case '"': return Json{0, string(), {}, {}};
      case 't': at_ += 4; return Json{1, {}, {}, {}};
      case 'f': at_ += 5; return Json{};
      default: return number();
    }
  }

 private:
  char next() {
    at_ = text_.find_first_not_of(" \n\r\t", at_);
    if (at_ == std::string::npos) throw std::runtime_error("unexpected end");
    return text_[at_];
  }
  // Past `separator`, or past `end`: then false.
  bool more(char end) {
    const char c = next();
    ++at_;
    if (c == end) return false;
    if (c != ',') throw std::runtime_error("expected a comma");
    return true;
  }
  Json object() {
    Json out;
    ++at_;
    if (next() == '}') return ++at_, out;
    do {
      next();
      std::string name = string();
      next();  // the colon
      ++at_;
      out.fields.emplace(std::move(name), read());
    } while (more('}'));
    return out;
  }
  Json array() {
    Json out;
    ++at_;
    if (next() == ']') return ++at_, out;
    do out.items.push_back(read());
    while (more(']'));
    return out;
  }
  std::string string() {
    const std::size_t from = at_ + 1;
    const std::size_t to = text_.find('"', from);
    at_ = to + 1;
    return text_.substr(from, to - from);
  }
  Json number() {
    Json out;
    char* end = nullptr;
    out.number = std::strtoll(text_.c_str() + at_, &end, 10);
    if (end == text_.c_str() + at_) throw std::runtime_error("not a number");
    at_ = static_cast<std::size_t>(end - text_.c_str());
    return out;
  }

  std::string text_;
  std::size_t at_ = 0;
};

inline Json read_json(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error("cannot read " + path);
  std::ostringstream text;
  text << file.rdbuf();
  return JsonReader(text.str()).read();
}

}  // namespace ratesync::testing
