// A model server that costs nearly nothing, so that it is never what a benchmark measures.
// POST: reads the body, answers 200 with two bytes. "stream" in path or query: 100 events as
// chunked text/event-stream, one every 10 ms.
//
// Usage: backend PORT
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <unordered_map>
#include <vector>

namespace {
constexpr int kEvents = 100;
constexpr std::chrono::milliseconds kTick{10};
const std::string kAnswer = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}";
const std::string kHead =
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
const std::string kEvent =
    "data: {\"choices\": [{\"index\": 0, \"delta\": {\"content\": \" token\"}}], \"model\": \"llama\"}\n\n";

struct Connection {
  std::string head;
  size_t body_left = 0;
  bool is_chunked = false;  // and its head has been read
  int events_left = 0;
  bool is_stream = false;
};

bool EndsWith(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && !text.compare(text.size() - end.size(), end.size(), end);
}

std::string Lower(std::string text) {
  std::transform(text.begin(), text.end(), text.begin(), ::tolower);
  return text;
}

size_t ContentLength(const std::string& lower) {
  const size_t at = lower.find("\r\ncontent-length:");
  return at == std::string::npos ? 0 : std::strtoul(lower.c_str() + at + 17, nullptr, 10);
}

void Send(int fd, const std::string& text) { (void)!::send(fd, text.data(), text.size(), MSG_NOSIGNAL); }

std::string Chunk(const std::string& text) {
  char size[16];
  std::snprintf(size, sizeof size, "%zx\r\n", text.size());
  return size + text + "\r\n";
}
}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: backend PORT\n");
    return 2;
  }
  const int listener = ::socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
  const int one = 1;
  ::setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(std::atoi(argv[1])));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (::bind(listener, reinterpret_cast<sockaddr*>(&address), sizeof address) || ::listen(listener, 65535))
    return 1;
  const int poll = ::epoll_create1(0);
  epoll_event wanted{EPOLLIN, {.fd = listener}};
  ::epoll_ctl(poll, EPOLL_CTL_ADD, listener, &wanted);

  std::unordered_map<int, Connection> connections;
  std::vector<int> streaming;
  std::vector<char> buffer(1 << 20);
  std::vector<epoll_event> ready(512);
  auto due = std::chrono::steady_clock::now() + kTick;

  const auto answer = [&](int fd, Connection& connection) {
    if (connection.is_stream) {
      Send(fd, kHead);
      connection.events_left = kEvents;
      streaming.push_back(fd);
    } else {
      Send(fd, kAnswer);
    }
  };

  for (;;) {
    const int count = ::epoll_wait(poll, ready.data(), static_cast<int>(ready.size()), streaming.empty() ? -1 : 1);
    for (int index = 0; index < count; ++index) {
      const int fd = ready[index].data.fd;
      if (fd == listener) {
        const int accepted = ::accept4(listener, nullptr, nullptr, SOCK_NONBLOCK);
        if (accepted < 0) continue;
        ::setsockopt(accepted, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        epoll_event readable{EPOLLIN, {.fd = accepted}};
        ::epoll_ctl(poll, EPOLL_CTL_ADD, accepted, &readable);
        connections[accepted];
        continue;
      }
      const ssize_t size = ::recv(fd, buffer.data(), buffer.size(), 0);
      if (size <= 0) {
        streaming.erase(std::remove(streaming.begin(), streaming.end(), fd), streaming.end());
        connections.erase(fd);
        ::close(fd);
        continue;
      }
      Connection& connection = connections[fd];
      size_t at = 0;
      while (at < static_cast<size_t>(size)) {
        if (connection.body_left) {
          const size_t taken = std::min(connection.body_left, static_cast<size_t>(size) - at);
          connection.body_left -= taken;
          at += taken;
          if (!connection.body_left) answer(fd, connection);
          continue;
        }
        connection.head += buffer[at++];
        if (connection.is_chunked) {
          if (!EndsWith(connection.head, "0\r\n\r\n")) continue;
          connection.is_chunked = false;
          connection.head.clear();
          answer(fd, connection);
          continue;
        }
        if (!EndsWith(connection.head, "\r\n\r\n")) continue;
        const std::string lower = Lower(connection.head);
        connection.body_left = ContentLength(lower);
        connection.is_chunked = lower.find("\r\ntransfer-encoding: chunked\r\n") != std::string::npos;
        connection.is_stream = connection.head.find("stream") < connection.head.find("\r\n");
        connection.head.clear();
        if (!connection.body_left && !connection.is_chunked) answer(fd, connection);
      }
    }
    const auto now = std::chrono::steady_clock::now();
    if (streaming.empty()) due = now + kTick;
    if (now < due) continue;
    due += kTick;
    for (auto fd = streaming.begin(); fd != streaming.end();) {
      Connection& connection = connections[*fd];
      Send(*fd, Chunk(kEvent));
      if (--connection.events_left) {
        ++fd;
      } else {
        Send(*fd, "0\r\n\r\n");
        fd = streaming.erase(fd);
      }
    }
  }
}
