/* HTTP load on 127.0.0.1.  usage: load PORT BODIES CONNECTIONS SECONDS WARM_SECONDS [REQUESTS_PER_SECOND]
 *
 * Without a rate: a closed loop, each connection sends its next request when it has its answer.  With one: open-loop
 * Poisson arrivals, latency counted from the moment a request was due.  BODIES holds records "LENGTH\n" and as many
 * bytes.  Prints one JSON line: requests in the window, failures, latency and first-byte percentiles in microseconds,
 * events per second, and the 99th percentile of the gaps between them. */
#include "wire.h"
#include <fcntl.h>
#include <math.h>

enum { HEAD, SIZED, CHUNK_SIZE, CHUNK, CHUNK_END, TRAILER };
typedef struct { uint64_t bucket[2048], total; } histogram; /* 32 buckets an octave: 2 % wide */
typedef struct { int fd, busy, state, status, first; long left; int64_t since, heard; char head[4096]; int used; size_t sent; int body; } conn;

static int port, poller, idle_count, bodies, next_body, open_loop;
static char **wire;
static size_t *wire_size;
static conn *idle[8192];
static int64_t from, until, waiting[1 << 20];
static unsigned waiting_head, waiting_tail;
static histogram latency, first_byte, gaps;
static unsigned long ok, failed, lost, events;

static void note(histogram *h, int64_t ns) {
    double octave = ns > 64 ? log2(ns / 64.0) : 0;
    int index = octave * 32;
    h->bucket[index < 2048 ? index : 2047]++;
    h->total++;
}

static double percentile(const histogram *h, double p) {
    uint64_t seen = 0;
    for (int i = 0; i < 2048; i++)
        if ((seen += h->bucket[i]) && seen >= h->total * p) return 64 * exp2((i + 0.5) / 32) / 1000;
    return 0;
}

static int counts(const conn *c) { return c->since >= from && c->since < until; }

static void transmit(conn *c) {
    while (c->sent < wire_size[c->body]) {
        ssize_t n = send(c->fd, wire[c->body] + c->sent, wire_size[c->body] - c->sent, MSG_NOSIGNAL);
        if (n < 0) return; /* EPOLLOUT comes */
        c->sent += n;
    }
}

static void begin(conn *c, int64_t due) {
    c->busy = 1, c->state = HEAD, c->used = 0, c->sent = 0, c->first = 1, c->since = due;
    c->body = next_body;
    next_body = (next_body + 1) % bodies;
    transmit(c);
}

static void take_waiting(void) {
    while (idle_count && waiting_head != waiting_tail) {
        conn *c = idle[--idle_count];
        if (c->fd >= 0) begin(c, waiting[waiting_head++ % (1 << 20)]);
    }
}

static conn *connected(void) {
    conn *c = calloc(1, sizeof *c);
    struct sockaddr_in a = local(port);
    c->fd = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(c->fd, (void *)&a, sizeof a)) { perror("load"); exit(1); }
    fcntl(c->fd, F_SETFL, O_NONBLOCK);
    no_delay(c->fd);
    struct epoll_event e = {.events = EPOLLIN | EPOLLOUT | EPOLLET, .data.ptr = c};
    epoll_ctl(poller, EPOLL_CTL_ADD, c->fd, &e);
    return c;
}

static void finished(conn *c, int64_t now) {
    if (counts(c)) {
        if (c->status == 200) ok++; else failed++;
        note(&latency, now - c->since);
    }
    c->busy = 0;
    if (open_loop) {
        idle[idle_count++] = c;
        take_waiting();
    } else if (now < until) {
        begin(c, now_ns());
    }
}

static void body_came(conn *c, int64_t now) {
    if (c->first && counts(c)) note(&first_byte, now - c->since);
    if (!c->first && c->state == CHUNK && now >= from && now < until) note(&gaps, now - c->heard);
    c->first = 0;
    c->heard = now;
}

/* Take what came; a response may end within it, but never is followed by another one. */
static void take(conn *c, const char *data, ssize_t n, int64_t now) {
    while (n > 0 && c->busy) {
        if (c->state == HEAD) {
            c->head[c->used++] = *data++, n--;
            if (c->used < 4 || memcmp(c->head + c->used - 4, "\r\n\r\n", 4)) {
                if (c->used == sizeof c->head - 1) exit(1);
                continue;
            }
            c->head[c->used] = 0;
            const char *length = header(c->head, "\r\ncontent-length:");
            c->status = atoi(c->head + 9);
            c->left = length ? atol(length) : 0;
            c->state = length ? SIZED : CHUNK_SIZE;
            c->used = 0;
            if (length && !c->left) finished(c, now);
        } else if (c->state == SIZED || c->state == CHUNK) {
            long part = n < c->left ? n : c->left;
            body_came(c, now);
            if (c->state == CHUNK)
                for (long i = 0; i + 1 < part; i++) events += data[i] == '\n' && data[i + 1] == '\n' && now >= from && now < until;
            data += part, n -= part, c->left -= part;
            if (c->left) continue;
            if (c->state == SIZED) finished(c, now);
            else c->state = CHUNK_END, c->left = 2;
        } else if (c->state == CHUNK_END) {
            data++, n--;
            if (!--c->left) c->state = CHUNK_SIZE, c->used = 0;
        } else { /* a chunk's size, or the line after the last chunk */
            char byte = *data++;
            n--;
            if (byte != '\n') { if (c->used < 30) c->head[c->used++] = byte; continue; }
            c->head[c->used] = 0;
            c->used = 0;
            if (c->state == TRAILER) { finished(c, now); continue; }
            c->left = strtol(c->head, NULL, 16);
            c->state = c->left ? CHUNK : TRAILER;
        }
    }
}

static void read_bodies(const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) { perror(path); exit(1); }
    for (long length; fscanf(file, "%ld", &length) == 1; bodies++) {
        char head[512];
        fgetc(file);
        int n = snprintf(head, sizeof head, "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nUser-Agent: load\r\n"
                         "Accept: */*\r\nAccept-Encoding: identity\r\nAuthorization: Bearer sk-test\r\n"
                         "Content-Type: application/json\r\nContent-Length: %ld\r\n\r\n", port, length);
        wire = realloc(wire, (bodies + 1) * sizeof *wire);
        wire_size = realloc(wire_size, (bodies + 1) * sizeof *wire_size);
        wire[bodies] = malloc(n + length);
        memcpy(wire[bodies], head, n);
        if (fread(wire[bodies] + n, 1, length, file) != (size_t)length) exit(1);
        wire_size[bodies] = n + length;
    }
    fclose(file);
}

int main(int argc, char **argv) {
    if (argc < 6) return 2;
    port = atoi(argv[1]);
    int connections = atoi(argv[3]);
    double seconds = atof(argv[4]), warm = atof(argv[5]), rate = argc > 6 ? atof(argv[6]) : 0;
    read_bodies(argv[2]);
    signal(SIGPIPE, SIG_IGN);
    poller = epoll_create1(0);
    open_loop = rate > 0;
    srand48(7);
    int64_t start = now_ns(), due = start;
    from = start + warm * 1e9, until = from + seconds * 1e9;
    for (int i = 0; i < connections; i++) {
        conn *c = connected();
        if (open_loop) idle[idle_count++] = c;
        else begin(c, now_ns());
    }
    static char data[1 << 18];
    struct epoll_event ready[1024];
    int64_t grace = open_loop ? 1500000000 : 300000000;
    for (int64_t now; (now = now_ns()) < until + grace;) {
        for (; open_loop && due <= now && due < until; due += -log(1 - drand48()) / rate * 1e9)
            waiting[waiting_tail++ % (1 << 20)] = due;
        if (open_loop) take_waiting();
        int64_t wait = open_loop && due > now && due - now < 1000000 ? due - now : 1000000;
        struct timespec limit = {0, wait};
        int n = epoll_pwait2(poller, ready, 1024, &limit, NULL);
        for (int i = 0; i < n; i++) {
            conn *c = ready[i].data.ptr;
            if (c->fd < 0) continue;
            if (c->busy) transmit(c);
            ssize_t got;
            while ((got = recv(c->fd, data, sizeof data, 0)) > 0) take(c, data, got, now_ns());
            if (got == 0 || errno != EAGAIN) { /* the router closed it */
                if (c->busy && counts(c)) lost++;
                close(c->fd);
                c->fd = -1;
                if (now < until) {
                    conn *fresh = connected();
                    if (open_loop) idle[idle_count++] = fresh;
                    else begin(fresh, now_ns());
                }
            }
        }
    }
    printf("{\"rps\":%.1f,\"ok\":%lu,\"failed\":%lu,\"lost\":%lu,\"p50_us\":%.0f,\"p99_us\":%.0f,\"first_p50_us\":%.0f,"
           "\"first_p99_us\":%.0f,\"events_per_s\":%.0f,\"gap_p99_us\":%.0f}\n", ok / seconds, ok, failed, lost,
           percentile(&latency, .5), percentile(&latency, .99), percentile(&first_byte, .5), percentile(&first_byte, .99),
           events / seconds, percentile(&gaps, .99));
    return 0;
}
