// The url: what it means, and that nothing a user can type breaks it or puts a password into a message.
#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "ratesync/redis/url.h"

namespace ratesync::redis {
namespace {

RedisUrl parsed(std::string_view url, int db = 0, std::string_view password = {}) {
  Result<RedisUrl> result = parse_url(url, db, password);
  EXPECT_TRUE(result.ok()) << url << ": " << result.status().message;
  return result.ok() ? result.value() : RedisUrl{};
}

// Refused, with this in the message.
void refused(std::string_view url, std::string_view because, int db = 0) {
  const Result<RedisUrl> result = parse_url(url, db);
  ASSERT_FALSE(result.ok()) << url;
  EXPECT_EQ(result.status().code, Code::invalid);
  EXPECT_NE(result.status().message.find(because), std::string::npos)
      << url << ": " << result.status().message;
  EXPECT_EQ(result.status().message.find("hunter"), std::string::npos) << result.status().message;
}

TEST(RedisUrlTest, OneServer) {
  EXPECT_EQ(parsed("redis://").hosts, (std::vector<HostPort>{{"localhost", 6379}}));
  EXPECT_EQ(parsed("redis://example.org").hosts, (std::vector<HostPort>{{"example.org", 6379}}));
  const RedisUrl full = parsed("REDIS://us%40er:p%2Fa%3Ass@cache-1.example:7001/15");
  EXPECT_EQ(full.hosts, (std::vector<HostPort>{{"cache-1.example", 7001}}));
  EXPECT_EQ(full.user, "us@er");
  EXPECT_EQ(full.password, "p/a:ss");
  EXPECT_EQ(full.db, 15);
  EXPECT_FALSE(full.tls.on);
  EXPECT_EQ(full.topology, Topology::single);
}

TEST(RedisUrlTest, PasswordAloneAndUserAlone) {
  EXPECT_EQ(parsed("redis://:secret@h").password, "secret");
  EXPECT_EQ(parsed("redis://:secret@h").user, "");
  EXPECT_EQ(parsed("redis://me@h").user, "me");
  EXPECT_EQ(parsed("redis://:a:b@h").password, "a:b");
  EXPECT_EQ(parsed("redis://h/?username=me&password=x%26y").password, "x&y");
}

TEST(RedisUrlTest, TheUrlWinsOverTheOptions) {
  EXPECT_EQ(parsed("redis://h", 3, "opt").db, 3);
  EXPECT_EQ(parsed("redis://h", 3, "opt").password, "opt");
  EXPECT_EQ(parsed("redis://h/0", 3).db, 0);
  EXPECT_EQ(parsed("redis://h?db=2", 3).db, 2);
  EXPECT_EQ(parsed("redis://:url@h", 0, "opt").password, "url");
  EXPECT_EQ(parsed("redis://:@h", 0, "opt").password, "");
  EXPECT_EQ(parsed("redis://me@h", 0, "opt").password, "opt");
}

TEST(RedisUrlTest, Addresses) {
  EXPECT_EQ(parsed("redis://[::1]").hosts, (std::vector<HostPort>{{"::1", 6379}}));
  EXPECT_EQ(parsed("redis://[fe80::2]:7000/1").hosts, (std::vector<HostPort>{{"fe80::2", 7000}}));
  EXPECT_EQ(parsed("redis://[::1]:7000").target().describe(), "[::1]:7000");
  refused("redis://::1", "brackets");
  refused("redis://[::1", "no ']'");
  refused("redis://[localhost]", "IPv6");
  refused("redis://[::1]x", "may follow");
}

TEST(RedisUrlTest, UnixSocket) {
  EXPECT_EQ(parsed("unix:///run/redis.sock?db=4").path, "/run/redis.sock");
  EXPECT_EQ(parsed("unix:///run/redis.sock?db=4").db, 4);
  EXPECT_EQ(parsed("redis+unix://me:pw@/run/a%20b?password=z").path, "/run/a b");
  EXPECT_EQ(parsed("redis+unix://me:pw@/run/a%20b?password=z").password, "pw");
  refused("unix://run/redis.sock", "three slashes");
  refused("unix://", "path of the Unix socket");
  refused("unix:///a%00b", "NUL");
}

TEST(RedisUrlTest, SentinelAndCluster) {
  const RedisUrl s = parsed(
      "redis+sentinel://me:pw@h1:26380,h2,[::1]:5/mymaster/2?sentinel_username=su&sentinel_password=sp");
  EXPECT_EQ(s.topology, Topology::sentinel);
  EXPECT_EQ(s.hosts, (std::vector<HostPort>{{"h1", 26380}, {"h2", 26379}, {"::1", 5}}));
  EXPECT_EQ(s.primary_name, "mymaster");
  EXPECT_EQ(s.db, 2);
  EXPECT_EQ(s.sentinel_user, "su");
  EXPECT_EQ(s.sentinel_password, "sp");
  EXPECT_EQ(s.describe(), "redis+sentinel://me@h1:26380,h2:26379,[::1]:5/mymaster/2");
  const RedisUrl c = parsed("rediss+cluster://h1:7000,h2:7001,h1:7000/");
  EXPECT_EQ(c.topology, Topology::cluster);
  EXPECT_TRUE(c.tls.on);
  EXPECT_EQ(c.hosts.size(), 2u) << "named twice, asked once";
  refused("redis+sentinel://h1", "mymaster");
  refused("redis+sentinel:///mymaster", "host name is missing");
  refused("redis+cluster://h1/1", "only db 0");
  refused("redis+cluster://h1", "only db 0", 1);
  refused("redis+cluster://h1,,h2", "host name is missing");
  refused("redis://h1,h2", "redis+sentinel://");
}

TEST(RedisUrlTest, Tls) {
  EXPECT_TRUE(parsed("rediss://h").tls.on);
  EXPECT_TRUE(parsed("rediss://h").tls.verify);
  const RedisUrl u = parsed("rediss://h?ssl_cert_reqs=none&ssl_ca_certs=%2Fca&ssl_certfile=c&ssl_keyfile=k");
  EXPECT_FALSE(u.tls.verify);
  EXPECT_EQ(u.tls.ca_file, "/ca");
  EXPECT_EQ(u.tls.cert_file, "c");
  EXPECT_EQ(u.tls.key_file, "k");
  refused("redis://h?ssl_ca_certs=x", "rediss://");
  refused("rediss://h?ssl_cert_reqs=optional", "required");
  refused("rediss://h?ssl_keyfile=k", "ssl_certfile");
}

TEST(RedisUrlTest, RefusalsSayTheCure) {
  refused("", "redis://localhost:6379/0");
  refused("localhost:6379", "redis://localhost:6379/0");
  refused("http://h", "redis://localhost:6379/0");
  refused("redis://h:0", "1 to 65535");
  refused("redis://h:65536", "1 to 65535");
  refused("redis://h:", "1 to 65535");
  refused("redis://h:-1", "1 to 65535");
  refused("redis://h/x", "whole number");
  refused("redis://h/-1", "whole number");
  refused("redis://h/99999999999", "whole number");
  refused("redis://h/1/2", "whole number");
  refused("redis://h", "whole number", -1);
  refused("redis://h?nonsense=1", "'nonsense'");
  refused("redis://h?nonsense=1", "db, username, password");
  refused("redis://h?db", "no value");
  refused("redis://h?db=1&db=2", "twice");
  refused("redis://h?sentinel_password=hunter2", "redis+sentinel://");
  refused("redis://a b", "percent-encoded");
  refused(std::string_view("redis://a\0b", 11), "percent-encoded");
  refused("redis://%zz@h", "hex digits");
  refused("redis://h?db=%4", "hex digits");
  refused(std::string("redis://") + std::string(20'000, 'a'), "longer");
}

TEST(RedisUrlTest, NoMessageShowsAPassword) {
  // Passwords whose special characters were not encoded.
  for (const char* url : {"redis://me:hunter/2@h/0", "redis://me:hunter?2@h", "redis://me:hunter?2=3@h",
                          "redis://me:hunter#2@h", "redis://me:hunter@2@h", "redis://me:hunter 2@h",
                          "redis://me:hunter%2@h", "redis://me:hunter", "rediss://:hunter?a=b@h",
                          "redis+sentinel://:hunter/2@h/m", "redis+cluster://:hunter,x@h", "unix://:hunter2",
                          "redis://h?password=hunter2&hunter=2", "redis://:[hunter", "redis://:hunter:2"}) {
    const Result<RedisUrl> result = parse_url(url);
    const std::string said = result.ok() ? result.value().describe() : result.status().message;
    EXPECT_EQ(said.find("hunter"), std::string::npos) << url << ": " << said;
  }
}

TEST(RedisUrlTest, RandomTextIsRefusedOrUnderstoodButNeverBreaksIt) {
  std::minstd_rand random(7);
  const std::string alphabet = "redisunx+:/@[],?&=%#0123456789.-_ab\t\xff";
  for (int i = 0; i < 20'000; ++i) {
    std::string url = i % 2 ? "redis+sentinel://" : "rediss://";
    for (unsigned n = random() % 24; n > 0; --n) url += alphabet[random() % alphabet.size()];
    const Result<RedisUrl> result = parse_url(url);
    if (result.ok()) {
      EXPECT_FALSE(result.value().hosts.empty()) << url;
      EXPECT_GE(result.value().db, 0) << url;
      for (const HostPort& h : result.value().hosts) EXPECT_GT(h.port, 0) << url;
    } else {
      EXPECT_EQ(result.status().code, Code::invalid) << url;
    }
  }
}

}  // namespace
}  // namespace ratesync::redis
