/* mock: an OpenAI chat-completions upstream that costs almost nothing. One thread, epoll, loopback only.
 *
 *     cc -O2 -o mock mock.c && ./mock PORT [BATCH]
 *
 * Every streamed chunk's text is the time at which it was sent: CLOCK_MONOTONIC in microseconds, 16 digits.
 * `load` subtracts it from the time of arrival. BATCH (default 1): chunks in one write when flat out.
 *
 * Knobs in the request body, found by plain search for their names:
 *     "stream": true            a stream of "max_tokens" (or "max_completion_tokens") chunks, default 16
 *     "seed": D                 D > 0: D microseconds between chunks; D < 0: break off after -D chunks
 *     "include_usage": true     a chunk with usage before [DONE]
 * GET /stats counts requests, streams started, done, aborted by the peer, died by a negative seed, and
 * events sent. Any other GET is answered with a list of models.
 *
 * Needs Linux 5.11 and glibc 2.35 for epoll_pwait2.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
    MAX_CONNS = 65536,
    MAX_EVENTS = 512,
    MAX_HEAD = 65536,
    OUT_SIZE = 16384,
    READ_SIZE = 65536,
    STEP_ROOM = 2048, /* the most that one step, or one whole answer, adds to `out` */
    STAMP_DIGITS = 16,
    BIG_BODY = 1000000,
};

typedef struct {
    int fd;
    char *in;
    size_t in_len, in_cap;
    char out[OUT_SIZE];
    size_t out_start, out_end;
    bool blocked;     /* the socket took less than `out` has: waiting for EPOLLOUT */
    bool close_after; /* the request said Connection: close */
    bool streaming;
    bool want_usage;
    long left, sent;
    long die_after;       /* chunks, 0: never */
    int64_t delay, due;   /* microseconds; delay 0: flat out */
    int paced_at, flat_at; /* place in the lists below, -1: not there */
} Conn;

static int poller, listener;
static Conn *paced[MAX_CONNS]; /* streams with a delay: a heap, the next one due first */
static int paced_count;
static Conn *flat[MAX_CONNS]; /* flat-out streams whose socket takes more, in no order */
static int flat_count;
static int batch = 1;

static struct {
    long requests, started, done, aborted, died, events, active, big;
} stats;

static int64_t now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

/* The heap of paced streams */

static void paced_put(int at, Conn *c)
{
    paced[at] = c;
    c->paced_at = at;
}

static void paced_up(int at)
{
    Conn *c = paced[at];
    while (at > 0 && paced[(at - 1) / 2]->due > c->due) {
        paced_put(at, paced[(at - 1) / 2]);
        at = (at - 1) / 2;
    }
    paced_put(at, c);
}

static void paced_down(int at)
{
    Conn *c = paced[at];
    for (;;) {
        int child = 2 * at + 1;
        if (child >= paced_count)
            break;
        if (child + 1 < paced_count && paced[child + 1]->due < paced[child]->due)
            child++;
        if (paced[child]->due >= c->due)
            break;
        paced_put(at, paced[child]);
        at = child;
    }
    paced_put(at, c);
}

static void paced_add(Conn *c)
{
    paced_put(paced_count, c);
    paced_count++;
    paced_up(c->paced_at);
}

static void paced_remove(Conn *c)
{
    int at = c->paced_at;
    if (at < 0)
        return;
    c->paced_at = -1;
    paced_count--;
    if (at == paced_count)
        return;
    Conn *last = paced[paced_count];
    paced_put(at, last);
    paced_down(at);
    paced_up(last->paced_at);
}

/* The list of flat-out streams */

static void flat_add(Conn *c)
{
    if (c->flat_at >= 0)
        return;
    c->flat_at = flat_count;
    flat[flat_count++] = c;
}

static void flat_remove(Conn *c)
{
    if (c->flat_at < 0)
        return;
    flat_count--;
    flat[c->flat_at] = flat[flat_count];
    flat[c->flat_at]->flat_at = c->flat_at;
    c->flat_at = -1;
}

/* Connections */

static void watch(Conn *c, int operation, bool writable)
{
    struct epoll_event e = {.events = EPOLLIN | EPOLLRDHUP, .data.ptr = c};
    if (writable)
        e.events |= EPOLLOUT;
    epoll_ctl(poller, operation, c->fd, &e);
}

static void end_stream(Conn *c, long *outcome)
{
    c->streaming = false;
    stats.active--;
    (*outcome)++;
    paced_remove(c);
    flat_remove(c);
}

static void drop(Conn *c)
{
    if (c->streaming)
        end_stream(c, &stats.aborted);
    close(c->fd);
    free(c->in);
    free(c);
}

static void accept_all(void)
{
    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK);
        if (fd < 0)
            return;
        int one = 1;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        Conn *c = calloc(1, sizeof *c);
        c->fd = fd;
        c->paced_at = -1;
        c->flat_at = -1;
        watch(c, EPOLL_CTL_ADD, false);
    }
}

/* Output. Functions that return bool return false when the connection must be dropped. */

static size_t room(const Conn *c)
{
    return OUT_SIZE - c->out_end;
}

static void put(Conn *c, const char *data, size_t length)
{
    memcpy(c->out + c->out_end, data, length); /* callers have looked at room() */
    c->out_end += length;
}

static bool flush(Conn *c)
{
    while (c->out_start < c->out_end) {
        ssize_t n = send(c->fd, c->out + c->out_start, c->out_end - c->out_start, MSG_NOSIGNAL);
        if (n < 0 && errno != EAGAIN)
            return false;
        if (n < 0) {
            memmove(c->out, c->out + c->out_start, c->out_end - c->out_start);
            c->out_end -= c->out_start;
            c->out_start = 0;
            if (!c->blocked)
                watch(c, EPOLL_CTL_MOD, true);
            c->blocked = true;
            flat_remove(c);
            return true;
        }
        c->out_start += n;
    }
    c->out_start = c->out_end = 0;
    if (c->blocked)
        watch(c, EPOLL_CTL_MOD, false);
    c->blocked = false;
    if (c->streaming && c->delay == 0)
        flat_add(c);
    return c->streaming || !c->close_after;
}

/* What is said */

#define CHUNK_HEAD \
    "data: {\"id\":\"chatcmpl-0123456789abcdef\",\"object\":\"chat.completion.chunk\"," \
    "\"created\":1700000000,\"model\":\"deepseek-v3\",\"system_fingerprint\":\"fp_mock\",\"choices\":["

static const char TEXT_EVENT[] = CHUNK_HEAD
    "{\"index\":0,\"delta\":{\"content\":\"TTTTTTTTTTTTTTTT\"},\"logprobs\":null,\"finish_reason\":null}]}\n\n";

static const char FINISH_EVENT[] = CHUNK_HEAD
    "{\"index\":0,\"delta\":{},\"logprobs\":null,\"finish_reason\":\"stop\"}]}\n\n";

static const char DONE_EVENT[] = "data: [DONE]\n\n";

static const char STREAM_HEAD[] =
    "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nCache-Control: no-cache\r\n"
    "Transfer-Encoding: chunked\r\n\r\n";

static const char COMPLETION[] =
    "{\"id\":\"chatcmpl-0123456789abcdef\",\"object\":\"chat.completion\",\"created\":1700000000,"
    "\"model\":\"deepseek-v3\",\"system_fingerprint\":\"fp_mock\",\"choices\":[{\"index\":0,\"message\":"
    "{\"role\":\"assistant\",\"content\":\"Hello! How can I help you today?\"},\"logprobs\":null,"
    "\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":12,\"completion_tokens\":9,"
    "\"total_tokens\":21}}";

static const char MODELS[] =
    "{\"object\":\"list\",\"data\":[{\"id\":\"deepseek-v3\",\"object\":\"model\",\"created\":1700000000,"
    "\"owned_by\":\"mock\",\"max_model_len\":131072}]}";

static char text_chunk[512]; /* TEXT_EVENT as an HTTP chunk, filled once */
static size_t text_chunk_length;
static char *text_stamp;

static void put_chunk(Conn *c, const char *event)
{
    c->out_end += sprintf(c->out + c->out_end, "%zx\r\n%s\r\n", strlen(event), event);
}

static void prepare_text_chunk(void)
{
    text_chunk_length = sprintf(text_chunk, "%zx\r\n%s\r\n", strlen(TEXT_EVENT), TEXT_EVENT);
    text_stamp = strstr(text_chunk, "TTTTTTTTTTTTTTTT");
}

static void put_text(Conn *c)
{
    int64_t t = now_us();
    for (int i = STAMP_DIGITS - 1; i >= 0; i--) {
        text_stamp[i] = '0' + t % 10;
        t /= 10;
    }
    put(c, text_chunk, text_chunk_length);
    c->left--;
    c->sent++;
    stats.events++;
}

static void put_end(Conn *c)
{
    put_chunk(c, FINISH_EVENT);
    if (c->want_usage) {
        char usage[512];
        sprintf(usage,
                CHUNK_HEAD "],\"usage\":{\"prompt_tokens\":12,\"completion_tokens\":%ld,\"total_tokens\":%ld}}\n\n",
                c->sent, c->sent + 12);
        put_chunk(c, usage);
    }
    put_chunk(c, DONE_EVENT);
    put(c, "0\r\n\r\n", 5);
}

static void put_json(Conn *c, const char *body)
{
    c->out_end += sprintf(c->out + c->out_end,
                          "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s",
                          strlen(body), body);
}

static void put_stats(Conn *c)
{
    char body[512];
    sprintf(body,
            "{\"req\":%ld,\"started\":%ld,\"done\":%ld,\"aborted\":%ld,\"died\":%ld,\"events\":%ld,"
            "\"active\":%ld,\"big\":%ld}\n",
            stats.requests, stats.started, stats.done, stats.aborted, stats.died, stats.events, stats.active,
            stats.big);
    put_json(c, body);
}

/* Input */

/* The text after `"name":` and spaces in a body, or NULL. */
static const char *field(const char *body, const char *name)
{
    char key[64];
    int length = sprintf(key, "\"%s\":", name);
    const char *at = strstr(body, key);
    if (!at)
        return NULL;
    at += length;
    while (*at == ' ')
        at++;
    return at;
}

static long number(const char *body, const char *name, long absent)
{
    const char *at = field(body, name);
    return at ? atol(at) : absent;
}

static bool is_true(const char *body, const char *name)
{
    const char *at = field(body, name);
    return at && *at == 't';
}

static void start_stream(Conn *c, const char *body)
{
    long seed = number(body, "seed", 0);
    c->left = number(body, "max_tokens", number(body, "max_completion_tokens", 16));
    c->sent = 0;
    c->delay = seed > 0 ? seed : 0;
    c->die_after = seed < 0 ? -seed : 0;
    c->want_usage = is_true(body, "include_usage");
    c->streaming = true;
    stats.started++;
    stats.active++;
    put(c, STREAM_HEAD, sizeof STREAM_HEAD - 1);
    if (c->delay > 0) {
        c->due = now_us() + c->delay;
        paced_add(c);
    }
}

/* `request` is the head and body of one whole request, ended with a NUL. */
static void answer(Conn *c, const char *request, const char *body)
{
    stats.requests++;
    if (strlen(body) > BIG_BODY)
        stats.big++;
    if (!strncmp(request, "GET /stats", 10))
        put_stats(c);
    else if (!strncmp(request, "GET", 3))
        put_json(c, MODELS);
    else if (is_true(body, "stream"))
        start_stream(c, body);
    else
        put_json(c, COMPLETION);
}

/* Length of the request at the start of `in`, 0 if it is not all there yet, -1 if it is not for us. */
static ssize_t request_length(Conn *c, size_t *head_length)
{
    char *end = memmem(c->in, c->in_len, "\r\n\r\n", 4);
    if (!end)
        return c->in_len > MAX_HEAD ? -1 : 0;
    *head_length = end + 4 - c->in;
    char saved = end[2];
    end[2] = 0; /* so that only the head is searched */
    const char *length = strcasestr(c->in, "\r\ncontent-length:");
    bool chunked = strcasestr(c->in, "\r\ntransfer-encoding:");
    bool expects = strcasestr(c->in, "\r\nexpect: 100-continue");
    c->close_after = strcasestr(c->in, "\r\nconnection: close");
    size_t total = *head_length + (length ? atol(length + 17) : 0);
    end[2] = saved;
    if (chunked)
        return -1; /* no gateway sends these bodies in chunks */
    if (c->in_len >= total)
        return total;
    if (expects && c->in_len == *head_length)
        send(c->fd, "HTTP/1.1 100 Continue\r\n\r\n", 25, MSG_NOSIGNAL);
    return 0;
}

static bool handle_requests(Conn *c)
{
    while (!c->streaming && c->in_len > 0 && room(c) >= STEP_ROOM) {
        size_t head_length;
        ssize_t length = request_length(c, &head_length);
        if (length < 0)
            return false;
        if (length == 0)
            return true;
        char saved = c->in[length];
        c->in[length] = 0;
        answer(c, c->in, c->in + head_length);
        c->in[length] = saved;
        c->in_len -= length;
        memmove(c->in, c->in + length, c->in_len);
        if (!flush(c))
            return false;
    }
    return true;
}

/* Reads what is there. False at the end of the connection too: a peer that shuts its side has left. */
static bool receive(Conn *c)
{
    for (;;) {
        if (c->in_cap - c->in_len < READ_SIZE + 1) {
            c->in_cap = c->in_cap * 2 + READ_SIZE + 1;
            c->in = realloc(c->in, c->in_cap);
        }
        size_t space = c->in_cap - c->in_len - 1; /* one byte for the NUL */
        ssize_t n = recv(c->fd, c->in + c->in_len, space, 0);
        if (n < 0)
            return errno == EAGAIN;
        if (n == 0)
            return false;
        c->in_len += n;
        if ((size_t)n < space)
            return true;
    }
}

static void on_ready(Conn *c, uint32_t events)
{
    bool alive = !(events & (EPOLLHUP | EPOLLERR));
    if (alive && events & EPOLLOUT)
        alive = flush(c);
    if (alive && events & (EPOLLIN | EPOLLRDHUP))
        alive = receive(c);
    if (!alive || !handle_requests(c))
        drop(c);
}

/* Streaming */

static bool step(Conn *c)
{
    int chunks = c->delay > 0 ? 1 : batch;
    while (chunks-- > 0 && c->left > 0 && room(c) >= STEP_ROOM) {
        if (c->die_after && c->sent >= c->die_after) {
            end_stream(c, &stats.died);
            return false;
        }
        put_text(c);
    }
    if (c->left <= 0 && room(c) >= STEP_ROOM) {
        put_end(c);
        end_stream(c, &stats.done);
    }
    return flush(c) && handle_requests(c);
}

static void step_due(void)
{
    int64_t t = now_us();
    while (paced_count && paced[0]->due <= t) {
        Conn *c = paced[0];
        c->due += c->delay;
        if (c->due < t - 1000000)
            c->due = t; /* a second behind: give the lost chunks up */
        paced_down(0);
        if (room(c) < STEP_ROOM)
            continue; /* a slow reader loses its turn, not a chunk */
        if (!step(c))
            drop(c);
    }
}

static void step_flat(void)
{
    for (int i = flat_count - 1; i >= 0; i--) {
        if (i < flat_count && !step(flat[i]))
            drop(flat[i]);
    }
}

static int wait_for_events(struct epoll_event *events)
{
    struct timespec timeout = {0, 0};
    if (flat_count == 0 && paced_count == 0)
        return epoll_wait(poller, events, MAX_EVENTS, -1);
    if (flat_count == 0) {
        int64_t wait = paced[0]->due - now_us();
        if (wait > 0) {
            timeout.tv_sec = wait / 1000000;
            timeout.tv_nsec = wait % 1000000 * 1000;
        }
    }
    return epoll_pwait2(poller, events, MAX_EVENTS, &timeout, NULL);
}

static void listen_on(int port)
{
    listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    int one = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 4096)) {
        perror("mock");
        exit(1);
    }
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = NULL};
    epoll_ctl(poller, EPOLL_CTL_ADD, listener, &e);
}

static void raise_file_limit(void)
{
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max < MAX_CONNS ? files.rlim_max : MAX_CONNS;
    setrlimit(RLIMIT_NOFILE, &files);
}

int main(int argc, char **argv)
{
    if (argc < 2 || argc > 3) {
        fprintf(stderr, "usage: mock PORT [BATCH]\n");
        return 2;
    }
    if (argc > 2)
        batch = atoi(argv[2]);
    signal(SIGPIPE, SIG_IGN);
    raise_file_limit();
    prepare_text_chunk();
    poller = epoll_create1(0);
    listen_on(atoi(argv[1]));
    for (;;) {
        static struct epoll_event events[MAX_EVENTS];
        int count = wait_for_events(events);
        for (int i = 0; i < count; i++) {
            if (events[i].data.ptr)
                on_ready(events[i].data.ptr, events[i].events);
            else
                accept_all();
        }
        step_due();
        step_flat();
    }
}
