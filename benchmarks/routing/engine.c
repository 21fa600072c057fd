/* N plain OpenAI engines in one epoll loop.  usage: engine FIRST_PORT COUNT [TTFT_US [ITL_US]]
 *
 * A request with "stream":true gets max_tokens events (64 if it names none), each in a chunk and a write of its own: the
 * first after TTFT_US, the others ITL_US apart.  Other chats get one JSON answer.  GET /stats says how many chats each
 * engine took.  What routers probe (health, models, server info) is answered as vLLM and SGLang answer it. */
#include "wire.h"

typedef struct client {
    int fd, engine, left, started, wants_write, dead;
    size_t sent;
    int64_t due;
    buffer in, out;
    struct client *next_stream;
} client;

static int poller, count;
static int64_t ttft_ns, itl_ns;
static unsigned long posts[256], serial;
static client *streams;
static char date[64];

static void tell_time(void) { /* as servers do: once a second */
    time_t t = time(NULL);
    strftime(date, sizeof date, "%a, %d %b %Y %H:%M:%S GMT", gmtime(&t));
}

static void drop(client *c) {
    if (c->dead) return;
    close(c->fd);
    c->dead = 1;
}

static void flush(client *c) {
    while (c->sent < c->out.used) {
        ssize_t n = send(c->fd, c->out.data + c->sent, c->out.used - c->sent, MSG_NOSIGNAL);
        if (n < 0 && errno != EAGAIN) { drop(c); return; }
        if (n < 0) break;
        c->sent += n;
    }
    int blocked = c->sent < c->out.used;
    if (!blocked) c->sent = c->out.used = 0;
    if (blocked != c->wants_write) {
        struct epoll_event e = {.events = EPOLLIN | (blocked ? EPOLLOUT : 0), .data.ptr = c};
        epoll_ctl(poller, EPOLL_CTL_MOD, c->fd, &e);
        c->wants_write = blocked;
    }
}

static void answer(client *c, const char *body, const char *type) {
    char head[256];
    int n = snprintf(head, sizeof head, "HTTP/1.1 200 OK\r\ndate: %s\r\nserver: uvicorn\r\ncontent-length: %zu\r\n"
                     "content-type: %s\r\n\r\n", date, strlen(body), type);
    append(&c->out, head, n);
    append(&c->out, body, strlen(body));
}

static void event(client *c) { /* one token of a stream */
    char data[400], chunk[440];
    if (!c->started) {
        int n = snprintf(data, sizeof data, "HTTP/1.1 200 OK\r\ndate: %s\r\nserver: uvicorn\r\n"
                         "content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n", date);
        append(&c->out, data, n);
        c->started = 1;
    }
    int n = snprintf(data, sizeof data, "data: {\"id\":\"chatcmpl-%016lx\",\"object\":\"chat.completion.chunk\","
                     "\"created\":1767225600,\"model\":\"m\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\" word%d\"},"
                     "\"logprobs\":null,\"finish_reason\":%s}]}\n\n", ++serial, c->left, c->left == 1 ? "\"stop\"" : "null");
    append(&c->out, chunk, snprintf(chunk, sizeof chunk, "%x\r\n%s\r\n", n, data));
    if (--c->left == 0) {
        const char *end = "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n";
        append(&c->out, end, strlen(end));
    }
}

static void serve(client *c, char *head, char *body, size_t length) {
    char text[1024];
    if (!strncmp(head, "POST /v1/chat/completions ", 26)) {
        posts[c->engine]++;
        char kept = body[length];
        body[length] = 0;
        char *stream = strstr(body, "\"stream\":"), *most = strstr(body, "\"max_tokens\":");
        int streamed = stream && strspn(stream + 9, " ") < 2 && strchr("t", stream[9 + strspn(stream + 9, " ")]);
        int tokens = most ? atoi(most + 13) : 64;
        body[length] = kept;
        if (streamed) {
            c->left = tokens > 0 ? tokens : 1;
            c->started = 0;
            c->due = now_ns() + ttft_ns;
            c->next_stream = streams;
            streams = c;
            return;
        }
        snprintf(text, sizeof text, "{\"id\":\"chatcmpl-%016lx\",\"object\":\"chat.completion\",\"created\":1767225600,"
                 "\"model\":\"m\",\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"The quick brown "
                 "fox jumps over the lazy dog and is gone.\",\"tool_calls\":[]},\"logprobs\":null,\"finish_reason\":\"stop\"}],"
                 "\"usage\":{\"prompt_tokens\":%zu,\"completion_tokens\":16,\"total_tokens\":%zu}}", ++serial, length / 4,
                 length / 4 + 16);
        answer(c, text, "application/json");
    } else if (!strncmp(head, "POST ", 5)) { /* as an engine without its render and tokenize routes */
        const char *none = "HTTP/1.1 404 Not Found\r\ncontent-length: 2\r\ncontent-type: application/json\r\n\r\n{}";
        append(&c->out, none, strlen(none));
    } else if (!strncmp(head, "GET /stats", 10)) {
        size_t n = 0;
        for (int i = 0; i < count; i++) n += snprintf(text + n, sizeof text - n, "%s%lu", i ? "," : "[", posts[i]);
        snprintf(text + n, sizeof text - n, "]");
        answer(c, text, "application/json");
    } else if (strstr(head, "models") && strstr(head, "models") < strchr(head, '\n')) {
        answer(c, "{\"object\":\"list\",\"data\":[{\"id\":\"m\",\"object\":\"model\",\"created\":1,\"owned_by\":\"vllm\","
                  "\"root\":\"m\",\"parent\":null,\"max_model_len\":131072}]}", "application/json");
    } else if (strstr(head, "_info") && strstr(head, "_info") < strchr(head, '\n')) {
        answer(c, "{\"model_path\":\"m\",\"tokenizer_path\":\"m\",\"served_model_name\":\"m\",\"is_generation\":true,"
                  "\"dp_size\":1,\"tp_size\":1,\"version\":\"0.5.14\"}", "application/json");
    } else if (!strncmp(head, "GET /metrics", 12)) {
        answer(c, "vllm:num_requests_running{model_name=\"m\"} 1\nvllm:num_requests_waiting{model_name=\"m\"} 0\n", "text/plain");
    } else {
        answer(c, "{}", "application/json");
    }
}

static void requests(client *c) { /* every whole request that came, unless a stream is under way */
    while (!c->dead && !c->left && c->in.used) {
        char *end = memmem(c->in.data, c->in.used, "\r\n\r\n", 4);
        if (!end) return;
        *end = 0;
        const char *length = header(c->in.data, "\r\ncontent-length:");
        size_t body = length ? strtoul(length, NULL, 10) : 0, head = end + 4 - c->in.data;
        if (c->in.used < head + body) { *end = '\r'; return; }
        serve(c, c->in.data, c->in.data + head, body);
        c->in.used -= head + body;
        memmove(c->in.data, c->in.data + head + body, c->in.used);
    }
    if (!c->dead && c->out.used) flush(c);
}

static void readable(client *c) {
    for (;;) {
        room(&c->in, 65536);
        ssize_t n = recv(c->fd, c->in.data + c->in.used, 65536, 0);
        if (n == 0 || (n < 0 && errno != EAGAIN)) { drop(c); return; }
        if (n < 0) break;
        c->in.used += n;
        if (n < 65536) break;
    }
    requests(c);
}

static int64_t run_streams(void) { /* emit what is due; return the nanoseconds until more is */
    int64_t now = now_ns(), soonest = 1000000000;
    for (client **at = &streams; *at;) {
        client *c = *at;
        while (!c->dead && c->left && c->due <= now) {
            event(c);
            flush(c);
            c->due += itl_ns;
        }
        if (c->dead || !c->left) {
            *at = c->next_stream;
            requests(c);
        } else {
            if (c->due - now < soonest) soonest = c->due - now;
            at = &c->next_stream;
        }
    }
    return soonest;
}

int main(int argc, char **argv) {
    int first = atoi(argv[1]);
    count = atoi(argv[2]);
    ttft_ns = argc > 3 ? atoll(argv[3]) * 1000 : 0;
    itl_ns = argc > 4 ? atoll(argv[4]) * 1000 : 0;
    poller = epoll_create1(0);
    signal(SIGPIPE, SIG_IGN);
    int listeners[256];
    for (int i = 0; i < count; i++) {
        int one = 1;
        struct sockaddr_in a = local(first + i);
        listeners[i] = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
        setsockopt(listeners[i], SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
        if (bind(listeners[i], (void *)&a, sizeof a) || listen(listeners[i], 4096)) { perror("engine"); return 1; }
        struct epoll_event e = {.events = EPOLLIN, .data.ptr = &listeners[i]};
        epoll_ctl(poller, EPOLL_CTL_ADD, listeners[i], &e);
    }
    struct epoll_event events[512];
    int64_t told = 0;
    for (;;) {
        if (now_ns() - told > 500000000) { tell_time(); told = now_ns(); }
        int64_t wait = run_streams();
        struct timespec limit = {wait / 1000000000, wait % 1000000000};
        int n = epoll_pwait2(poller, events, 512, &limit, NULL);
        for (int i = 0; i < n; i++) {
            int *listener = events[i].data.ptr;
            if (listener >= listeners && listener < listeners + count) {
                for (int fd; (fd = accept4(*listener, NULL, NULL, SOCK_NONBLOCK)) >= 0;) {
                    client *c = calloc(1, sizeof *c);
                    c->fd = fd;
                    c->engine = listener - listeners;
                    no_delay(fd);
                    struct epoll_event e = {.events = EPOLLIN, .data.ptr = c};
                    epoll_ctl(poller, EPOLL_CTL_ADD, fd, &e);
                }
                continue;
            }
            client *c = events[i].data.ptr; /* a dropped client is never freed: the bench ends soon */
            if (!c->dead && events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) readable(c);
            if (!c->dead && events[i].events & EPOLLOUT) flush(c);
        }
    }
}
