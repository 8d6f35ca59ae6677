/* What libzmq's own configure step would find on Linux. Without it libzmq takes its lowest common denominator:
   timers on the wall clock (gettimeofday), a socket pair for every wake-up, file descriptors that child processes
   inherit, and TCP keepalive whose interval and count options are accepted and ignored. */
#ifndef LLMSCALE_ZMQ_PLATFORM_HPP
#define LLMSCALE_ZMQ_PLATFORM_HPP

#if defined __linux__
/* Heartbeats, reconnects and poll time-outs must not jump with the date. */
#define HAVE_CLOCK_GETTIME
/* A wake-up is one 8-byte write, and a socket owns one descriptor for it. */
#define ZMQ_HAVE_EVENTFD
#define ZMQ_HAVE_EVENTFD_CLOEXEC
/* Worker processes must not inherit the node's sockets. */
#define ZMQ_HAVE_O_CLOEXEC
#define ZMQ_HAVE_SOCK_CLOEXEC
#define ZMQ_IOTHREAD_POLLER_USE_EPOLL_CLOEXEC
#define HAVE_ACCEPT4
/* A peer that vanished without a FIN is noticed by the kernel too. */
#define ZMQ_HAVE_SO_KEEPALIVE
#define ZMQ_HAVE_TCP_KEEPCNT
#define ZMQ_HAVE_TCP_KEEPIDLE
#define ZMQ_HAVE_TCP_KEEPINTVL
/* ipc: wildcard addresses, and the peer's user id in its address. */
#define HAVE_MKDTEMP
#define ZMQ_HAVE_SO_PEERCRED
/* Interfaces by name, and threads that a profiler can name. */
#define ZMQ_HAVE_IFADDRS
#define HAVE_IF_NAMETOINDEX
#define ZMQ_HAVE_PTHREAD_SETNAME_2
#define ZMQ_HAVE_PTHREAD_SET_AFFINITY
#define HAVE_POSIX_MEMALIGN 1
#define HAVE_FORK
#define ZMQ_HAVE_NOEXCEPT
#endif

#define ZMQ_CACHELINE_SIZE 64
#define SODIUM_STATIC 1

/* The library's own sources raise these three; cargo would print them at every build of a path dependency. */
#pragma GCC diagnostic ignored "-Wunused-parameter"
#pragma GCC diagnostic ignored "-Wimplicit-fallthrough"
#pragma GCC diagnostic ignored "-Wmissing-field-initializers"

#endif
