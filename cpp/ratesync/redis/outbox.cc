#include "ratesync/redis/outbox.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "ratesync/redis/wire.h"

namespace ratesync::redis {
namespace {

// What is handed to the socket in one go counts as sent, whether or not the server reads it.
constexpr std::size_t kPiece = 64 * 1024;

}  // namespace

void Outbox::push(std::initializer_list<std::string_view> head, const Command& rest, Nanos deadline,
                  ReplyCallback done) {
  if (pieces_.empty() || pieces_.back().bytes.size() >= kPiece)
    pieces_.push_back({std::exchange(spare_, {}), 0});
  Piece& piece = pieces_.back();
  const std::size_t before = piece.bytes.size();
  append_command(piece.bytes, head, rest);
  ++piece.commands;
  const std::size_t bytes = piece.bytes.size() - before;
  next_deadline_ = unsent() ? std::min(next_deadline_, deadline) : deadline;
  unsent_bytes_ += bytes;
  entries_.push_back({std::move(done), deadline, kForever, bytes});
}

std::string_view Outbox::take(Nanos now) {
  if (pieces_.empty()) return {};
  Piece& piece = pieces_.front();
  // The buffer written before is used again.
  spare_ = std::exchange(writing_, std::move(piece.bytes));
  spare_.clear();
  if (spare_.capacity() > 4 * kPiece) spare_ = {};
  unsent_bytes_ -= writing_.size();
  for (std::size_t i = 0; i < piece.commands; ++i) entries_[sent_++].sent_at = now;
  pieces_.pop_front();
  return writing_;
}

ReplyCallback Outbox::answered() {
  ReplyCallback done = std::move(entries_.front().done);
  entries_.pop_front();
  --sent_;
  return done;
}

std::vector<ReplyCallback> Outbox::take_sent() {
  std::vector<ReplyCallback> out;
  out.reserve(sent_);
  while (sent_ > 0) out.push_back(answered());
  return out;
}

std::vector<ReplyCallback> Outbox::take_unsent() {
  std::vector<ReplyCallback> out;
  out.reserve(unsent());
  for (std::size_t i = sent_; i < entries_.size(); ++i) out.push_back(std::move(entries_[i].done));
  entries_.resize(sent_);
  pieces_.clear();
  unsent_bytes_ = 0;
  return out;
}

std::vector<ReplyCallback> Outbox::take_expired(Nanos now) {
  std::vector<ReplyCallback> out;
  std::deque<Entry> kept;
  std::deque<Piece> pieces;
  next_deadline_ = kForever;
  std::size_t at = sent_;
  for (Piece& piece : pieces_) {
    Piece left;
    std::size_t offset = 0;
    for (std::size_t i = 0; i < piece.commands; ++i) {
      Entry& entry = entries_[at++];
      const std::size_t begin = std::exchange(offset, offset + entry.bytes);
      if (entry.deadline <= now) {
        unsent_bytes_ -= entry.bytes;
        out.push_back(std::move(entry.done));
        continue;
      }
      next_deadline_ = std::min(next_deadline_, entry.deadline);
      left.bytes.append(piece.bytes, begin, entry.bytes);
      ++left.commands;
      kept.push_back(std::move(entry));
    }
    if (left.commands > 0) pieces.push_back(std::move(left));
  }
  entries_.resize(sent_);
  std::move(kept.begin(), kept.end(), std::back_inserter(entries_));
  pieces_ = std::move(pieces);
  return out;
}

}  // namespace ratesync::redis
