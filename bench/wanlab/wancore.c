/* Packet forwarder of wanlab.
 *
 * Every access link of the emulated internet is a TUN device.  A packet read from one is
 * serialised onto its sender's uplink, held for the delay of the path, serialised onto the
 * receiver's downlink and written to the receiver's TUN.  All parameters live in shared
 * memory and are read anew for each packet.  `head`, `link` and `path` mirror table.py.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

enum { BATCH = 64, EVENTS = 64, MAX_PACKET = 65536 };
static const int64_t TICK = 50000;        /* ns, to which times of delivery are rounded */
static const double JITTER_TAU = 20e6;    /* ns, correlation time of jitter */

struct head { uint64_t delivered, late, worst_late_us, unroutable; };
struct link {
    double up_mbit, down_mbit, delay_ms, jitter_ms, loss, queue_ms;
    uint64_t up, addr, tx_packets, tx_bytes, rx_packets, rx_bytes, lost, overflowed, cut;
};
struct path { double delay_ms, loss; uint64_t cut; };

/* One direction of an access link: when its last queued bit leaves, and its delay noise. */
struct line { int64_t free, noise_at; double noise; };
struct packet { int src, dst, len, queued; unsigned char data[]; };
struct event { int64_t due; uint64_t order; struct packet *packet; };

static int n;
static const int *fds;
static struct head *head;
static struct link *links;
static struct path *paths;
static struct line *ups, *downs;
static int64_t *arrivals; /* the latest on each path, whose packets stay in order */
static struct event *heap;
static size_t events, room;
static uint64_t pushes, seed;

static int64_t clock_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static double uniform(void) { /* in (0, 1), by splitmix64 */
    uint64_t z = (seed += 0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return (((z ^ (z >> 31)) >> 11) + 0.5) / 9007199254740992.0;
}

static int lost(double percent) {
    return percent > 0 && uniform() * 100 < percent;
}

/* Delay noise: a Gaussian that wanders, so that back-to-back packets see the same. */
static double noise(struct line *line, double sigma, int64_t now) {
    if (sigma <= 0) return 0;
    double keep = exp((line->noise_at - now) / JITTER_TAU);
    double gauss = sqrt(-2 * log(uniform())) * cos(2 * M_PI * uniform());
    line->noise = keep * line->noise + sqrt(1 - keep * keep) * gauss;
    line->noise_at = now;
    return sigma * line->noise;
}

/* When a packet will have left a line of this rate; -1 if the queue before it is full. */
static int64_t transmit(struct line *line, double mbit, double queue_ms, int len, int64_t now) {
    if (mbit <= 0) return now;
    int64_t start = line->free > now ? line->free : now;
    if (start - now > queue_ms * 1e6) return -1;
    return line->free = start + (int64_t)(len * 8e3 / mbit);
}

static int before(const struct event *a, const struct event *b) {
    return a->due != b->due ? a->due < b->due : a->order < b->order;
}

/* Plan a packet's next step.  What is due within a tick shares one wakeup. */
static void push(int64_t due, struct packet *p) {
    if (events == room) heap = realloc(heap, (room = 2 * room + 1024) * sizeof *heap);
    struct event e = {(due + TICK / 2) / TICK * TICK, pushes++, p};
    size_t i = events++;
    for (; i && before(&e, &heap[(i - 1) / 2]); i = (i - 1) / 2) heap[i] = heap[(i - 1) / 2];
    heap[i] = e;
}

static struct event pop(void) {
    struct event top = heap[0], e = heap[--events];
    size_t i = 0, child;
    for (; (child = 2 * i + 1) < events; i = child) {
        if (child + 1 < events && before(&heap[child + 1], &heap[child])) child++;
        if (!before(&heap[child], &e)) break;
        heap[i] = heap[child];
    }
    heap[i] = e;
    return top;
}

/* A packet has come out of its sender's TUN: put a copy on its path, or drop it. */
static void send_packet(int src, const unsigned char *data, int len, int64_t now) {
    struct link *from = &links[src];
    from->tx_packets++;
    from->tx_bytes += len;
    if (len < 20 || data[0] >> 4 != 4) return;
    uint32_t addr = (uint32_t)data[16] << 24 | data[17] << 16 | data[18] << 8 | data[19];
    int dst = 0;
    while (dst < n && links[dst].addr != addr) dst++;
    if (dst == n) { head->unroutable++; return; }

    struct link *to = &links[dst];
    struct path *path = &paths[src * n + dst];
    struct line *up = &ups[src], *down = &downs[dst];
    if (!from->up || path->cut) { from->cut++; return; }
    if (lost(from->loss) || lost(path->loss)) { from->lost++; return; }
    int64_t left = transmit(up, from->up_mbit, from->queue_ms, len, now);
    if (left < 0) { from->overflowed++; return; }

    double hold = from->delay_ms + path->delay_ms + to->delay_ms
                + noise(up, from->jitter_ms, now) + noise(down, to->jitter_ms, now);
    int64_t due = left + (int64_t)(fmax(hold, 0) * 1e6), *latest = &arrivals[src * n + dst];
    struct packet *p = malloc(sizeof *p + len);
    *p = (struct packet){src, dst, len, 0};
    memcpy(p->data, data, len);
    push(*latest = due > *latest ? due : *latest, p);
}

/* A packet's time has come: it enters the queue of its downlink, or leaves it.
 * Returns whether that was the last of it. */
static int advance(struct packet *p, int64_t due, int64_t now) {
    struct link *to = &links[p->dst];
    if (!p->queued) {
        if (!to->up) return to->cut++, 1;
        if (lost(to->loss)) return to->lost++, 1;
        due = transmit(&downs[p->dst], to->down_mbit, to->queue_ms, p->len, due);
        if (due < 0) return to->overflowed++, 1;
        p->queued = 1;
        if (due > now) return push(due, p), 0;
    }
    if (write(fds[p->dst], p->data, p->len) == p->len) {
        to->rx_packets++;
        to->rx_bytes += p->len;
    }
    uint64_t late_us = now > due ? (now - due) / 1000 : 0;
    head->delivered++;
    head->late += late_us >= 1000;
    if (late_us > head->worst_late_us) head->worst_late_us = late_us;
    return 1;
}

/* Forward packets until `stop` is readable or hung up. */
void forward(int count, const int *tuns, int stop, uint64_t random_seed,
             struct head *h, struct link *l, struct path *p) {
    n = count, fds = tuns, seed = random_seed, head = h, links = l, paths = p;
    ups = calloc(n, sizeof *ups);
    downs = calloc(n, sizeof *downs);
    arrivals = calloc((size_t)n * n, sizeof *arrivals);
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    for (int i = 0; i <= n; i++) {
        struct epoll_event e = {.events = EPOLLIN, .data.u32 = i};
        epoll_ctl(epoll, EPOLL_CTL_ADD, i < n ? fds[i] : stop, &e);
    }
    prctl(PR_SET_TIMERSLACK, 1);

    static unsigned char data[MAX_PACKET];
    struct epoll_event ready[EVENTS];
    for (;;) {
        int64_t wait = events ? heap[0].due - clock_ns() : 1000000000;
        if (wait < 0) wait = 0;
        struct timespec timeout = {wait / 1000000000, wait % 1000000000};
        int found = epoll_pwait2(epoll, ready, EVENTS, &timeout, NULL);
        for (int i = 0; i < found; i++) {
            int src = ready[i].data.u32, len;
            if (src == n) return;
            int64_t now = clock_ns();
            for (int k = 0; k < BATCH && (len = read(fds[src], data, sizeof data)) > 0; k++)
                send_packet(src, data, len, now);
        }
        int64_t now;
        for (int k = 0; k < BATCH && events && heap[0].due <= (now = clock_ns()); k++) {
            struct event e = pop();
            if (advance(e.packet, e.due, now)) free(e.packet);
        }
    }
}
