/* load: a load generator for OpenAI chat completions. One thread, epoll, loopback only.
 *
 *     cc -O2 -o load load.c && ./load -P PORT -m ns|open|stream [options]
 *
 * -m ns      CONNS connections, each sends its next request when the last one is answered
 * -m open    RATE requests a second whatever the answers do; latency counts from when each was due
 * -m stream  CONNS streams, each begun again when it ends
 *
 * -P port (9000)     -c connections (32)       -d seconds measured (5)     -w seconds of warm-up before (1)
 * -r rate (50)       -n max_tokens (500)       -s seed, the mock's knob: D > 0 paces a stream (microseconds)
 * -k key             -u path                   -M model                    -x one more header line
 * -b bytes by which to lengthen the prompt
 *
 * Prints one line of JSON; times in microseconds, -1 where nothing was measured; 50 and 99 are percentiles:
 *     reqs, rps, lat*    whole requests that ended in the measured time
 *     non200, err        among those, other statuses; at any time: connections that broke, requests that found
 *                        no free connection (open), streams with too few tokens
 *     reconn             connections that the server closed
 *     evs, eps, MBps     tokens and body bytes received in the measured time
 *     add*               delay of a token from the mock's send to here (its text is the time of sending)
 *     gap*, ttft*        between two tokens of a stream; from the request to the first token
 *
 * Needs Linux 5.11 and glibc 2.35 for epoll_pwait2.
 */
#define _GNU_SOURCE
#include <ctype.h>
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
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
    MAX_HEAD = 16384,
    MAX_EVENTS = 1024,
    READ_SIZE = 262144,
    STAMP_DIGITS = 16,
    RETRY_US = 10000, /* before a broken connection is tried again */
};

static const char TOKEN_KEY[] = "\"content\":";
/* A token is the key, at most one space, a quote and the stamp; CARRY bytes can't hold a whole one. */
enum { KEY_LENGTH = sizeof TOKEN_KEY - 1, CARRY = KEY_LENGTH + 2 + STAMP_DIGITS - 1 };

typedef enum { IDLE, HEAD, BODY } State;
typedef enum { SIZE_LINE, DATA, DATA_END, TRAILER } ChunkState;

typedef struct {
    int fd; /* -1: not connected */
    State state;
    size_t request_sent;
    int64_t start_at;       /* when to send the next request while IDLE, 0: not by itself */
    int64_t due, last_token; /* when the request should have been sent; last_token 0: none yet */
    long tokens;

    char head[MAX_HEAD];
    size_t head_length;
    int status;
    bool chunked, close_after;
    long body_left; /* -1: up to the end of the connection */

    ChunkState chunk_state;
    long chunk_left;
    char line[32];
    size_t line_length;

    char carry[CARRY]; /* the end of the body so far, which may be the start of a token */
    size_t carried;
} Conn;

static struct {
    const char *mode, *key, *path, *model, *header;
    int port, conns, padding;
    long max_tokens, seed;
    double seconds, warm_up, rate;
} options = {
    .mode = "ns",
    .key = "sk-test",
    .path = "/v1/chat/completions",
    .model = "deepseek-v3",
    .header = "",
    .port = 9000,
    .conns = 32,
    .max_tokens = 500,
    .seconds = 5,
    .warm_up = 1,
    .rate = 50,
};

typedef struct {
    float *values;
    size_t count, capacity;
} Samples;

static Samples latency, added, gap, first_token;
static long requests, not_200, errors, closed, tokens, body_bytes;
static int64_t measure_from, measure_to;

static bool streaming, open_loop, paced;
static char *request;
static size_t request_length;
static Conn *conns;
static int waiting; /* connections with a start_at */
static int poller;

static int64_t now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

static bool measured(int64_t t)
{
    return t >= measure_from && t < measure_to;
}

/* Samples */

static void sample(Samples *s, double value)
{
    if (s->count == s->capacity) {
        s->capacity = s->capacity ? 2 * s->capacity : 65536;
        s->values = realloc(s->values, s->capacity * sizeof *s->values);
    }
    s->values[s->count++] = value;
}

static int compare(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return x < y ? -1 : x > y;
}

static void sort(Samples *s)
{
    qsort(s->values, s->count, sizeof *s->values, compare);
}

static double percentile(const Samples *s, double p)
{
    return s->count ? s->values[(size_t)(p * (s->count - 1))] : -1;
}

/* Connections and requests */

static void watch(Conn *c, int operation, bool writable)
{
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = c};
    if (writable)
        e.events |= EPOLLOUT;
    epoll_ctl(poller, operation, c->fd, &e);
}

static bool open_connection(Conn *c)
{
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    int one = 1;
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(options.port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (c->fd < 0 || (connect(c->fd, (struct sockaddr *)&address, sizeof address) && errno != EINPROGRESS))
        return false;
    watch(c, EPOLL_CTL_ADD, false);
    return true;
}

static void close_connection(Conn *c)
{
    if (c->fd >= 0)
        close(c->fd);
    c->fd = -1;
}

static void start_later(Conn *c, int64_t t)
{
    c->state = IDLE;
    c->start_at = t;
    waiting++;
}

/* The connection is of no more use, and its request is lost. */
static void fail(Conn *c, int64_t t)
{
    errors++;
    close_connection(c);
    c->state = IDLE;
    if (!open_loop)
        start_later(c, t + RETRY_US);
}

static void send_rest(Conn *c, int64_t t)
{
    while (c->request_sent < request_length) {
        ssize_t n = send(c->fd, request + c->request_sent, request_length - c->request_sent, MSG_NOSIGNAL);
        if (n < 0 && errno == EAGAIN) {
            watch(c, EPOLL_CTL_MOD, true);
            return;
        }
        if (n < 0) {
            fail(c, t);
            return;
        }
        c->request_sent += n;
    }
}

/* `due`: when this request should begin, which is before `t` if we are late. */
static void start_request(Conn *c, int64_t due, int64_t t)
{
    if (c->start_at) {
        c->start_at = 0;
        waiting--;
    }
    if (c->fd < 0 && !open_connection(c)) {
        fail(c, t);
        return;
    }
    c->state = HEAD;
    c->due = due;
    c->last_token = 0;
    c->tokens = 0;
    c->head_length = 0;
    c->carried = 0;
    c->request_sent = 0;
    send_rest(c, t);
}

static void finish_request(Conn *c, int64_t t)
{
    if (measured(t)) {
        requests++;
        sample(&latency, t - c->due);
        if (c->status != 200)
            not_200++;
    }
    if (streaming && c->status == 200 && c->tokens < options.max_tokens)
        errors++;
    c->state = IDLE;
    if (c->close_after) {
        close_connection(c);
        closed++;
    }
    if (!open_loop)
        start_request(c, t, t);
}

/* Reading answers */

static void on_token(Conn *c, const char *stamp, int64_t t)
{
    int64_t sent = 0;
    for (int i = 0; i < STAMP_DIGITS; i++)
        sent = sent * 10 + (stamp[i] - '0');
    c->tokens++;
    if (measured(t)) {
        tokens++;
        sample(&added, t - sent);
        if (c->last_token)
            sample(&gap, t - c->last_token);
        else
            sample(&first_token, t - c->due);
    }
    c->last_token = t;
}

/* Finds the tokens in the next bytes of a body. A token may come in pieces, so the last CARRY bytes are put in
 * front of the next ones: `data` must have that much room before it, holding bytes already used. */
static void scan_body(Conn *c, char *data, size_t length, int64_t t)
{
    if (measured(t))
        body_bytes += length;
    if (!streaming)
        return;
    char *at = data - c->carried, *end = data + length, *found;
    memcpy(at, c->carry, c->carried);
    while ((found = memmem(at, end - at, TOKEN_KEY, KEY_LENGTH))) {
        char *value = found + KEY_LENGTH;
        if (value < end && *value == ' ')
            value++;
        if (end - value < 1 + STAMP_DIGITS) {
            at = found; /* not all there yet */
            break;
        }
        if (value[0] == '"' && isdigit((unsigned char)value[1]))
            on_token(c, value + 1, t);
        at = value + 1;
    }
    c->carried = end - at < CARRY ? end - at : CARRY;
    memcpy(c->carry, end - c->carried, c->carried);
}

/* Takes a line's bytes up to its LF; true when it is complete in `line`, without CR and LF. */
static bool take_line(Conn *c, char byte)
{
    if (byte == '\n') {
        c->line[c->line_length] = 0;
        c->line_length = 0;
        return true;
    }
    if (byte != '\r' && c->line_length < sizeof c->line - 1)
        c->line[c->line_length++] = byte;
    return false;
}

/* Uses some of `data`, returns how much. May finish the request, and start the next. */
static size_t read_chunked(Conn *c, char *data, size_t length, int64_t t)
{
    if (c->chunk_state == DATA) {
        size_t used = length < (size_t)c->chunk_left ? length : (size_t)c->chunk_left;
        scan_body(c, data, used, t);
        c->chunk_left -= used;
        if (c->chunk_left == 0)
            c->chunk_state = DATA_END;
        return used;
    }
    if (!take_line(c, *data))
        return 1;
    switch (c->chunk_state) {
    case SIZE_LINE:
        c->chunk_left = strtol(c->line, NULL, 16);
        c->chunk_state = c->chunk_left ? DATA : TRAILER;
        break;
    case DATA_END:
        c->chunk_state = SIZE_LINE;
        break;
    default:
        if (c->line[0] == 0)
            finish_request(c, t);
    }
    return 1;
}

static size_t read_plain(Conn *c, char *data, size_t length, int64_t t)
{
    if (c->body_left < 0) {
        scan_body(c, data, length, t);
        return length;
    }
    size_t used = length < (size_t)c->body_left ? length : (size_t)c->body_left;
    scan_body(c, data, used, t);
    c->body_left -= used;
    if (c->body_left == 0)
        finish_request(c, t);
    return used;
}

static void parse_head(Conn *c, int64_t t)
{
    c->status = atoi(c->head + strlen("HTTP/1.1 "));
    if (c->status < 200) { /* 100 Continue and the like */
        c->head_length = 0;
        return;
    }
    const char *length = strcasestr(c->head, "\r\ncontent-length:");
    c->body_left = length ? atol(length + strlen("\r\ncontent-length:")) : -1;
    c->chunked = strcasestr(c->head, "\r\ntransfer-encoding: chunked");
    c->close_after = strcasestr(c->head, "\r\nconnection: close");
    c->chunk_state = SIZE_LINE;
    c->line_length = 0;
    c->state = BODY;
    if (!c->chunked && c->body_left == 0)
        finish_request(c, t);
}

static size_t read_head(Conn *c, const char *data, size_t length, int64_t t)
{
    size_t space = MAX_HEAD - 1 - c->head_length;
    size_t copied = length < space ? length : space;
    size_t from = c->head_length > 3 ? c->head_length - 3 : 0;
    memcpy(c->head + c->head_length, data, copied);
    c->head_length += copied;
    c->head[c->head_length] = 0;
    char *end = memmem(c->head + from, c->head_length - from, "\r\n\r\n", 4);
    if (!end) {
        if (copied == space)
            fail(c, t);
        return length;
    }
    size_t used = copied - (c->head + c->head_length - (end + 4));
    end[2] = 0;
    parse_head(c, t);
    return used;
}

static void read_answer(Conn *c, char *data, size_t length, int64_t t)
{
    while (length > 0 && c->state != IDLE) {
        size_t used;
        if (c->state == HEAD)
            used = read_head(c, data, length, t);
        else if (c->chunked)
            used = read_chunked(c, data, length, t);
        else
            used = read_plain(c, data, length, t);
        data += used;
        length -= used;
    }
}

static void on_closed(Conn *c, int64_t t)
{
    close_connection(c);
    closed++;
    if (c->state == BODY && !c->chunked && c->body_left < 0)
        finish_request(c, t);
    else if (c->state != IDLE)
        fail(c, t);
}

static void on_ready(Conn *c, uint32_t events)
{
    static char buffer[CARRY + READ_SIZE];
    if (c->fd < 0)
        return; /* closed while this event was waiting */
    if (events & EPOLLOUT) {
        watch(c, EPOLL_CTL_MOD, false);
        send_rest(c, now_us());
        if (c->fd < 0)
            return;
    }
    ssize_t n = recv(c->fd, buffer + CARRY, READ_SIZE, 0);
    int64_t t = now_us();
    if (n > 0)
        read_answer(c, buffer + CARRY, n, t);
    else if (n == 0 || (errno != EAGAIN && errno != EINTR))
        on_closed(c, t);
}

/* When to send */

static double next_due; /* open loop: the next request, in microseconds */
static int next_conn;

static void start_open(int64_t t)
{
    while (next_due <= t) {
        int i = 0;
        while (i < options.conns && conns[(next_conn + i) % options.conns].state != IDLE)
            i++;
        if (i < options.conns) {
            next_conn = (next_conn + i) % options.conns;
            start_request(&conns[next_conn], (int64_t)next_due, t);
            next_conn = (next_conn + 1) % options.conns;
        } else {
            errors++;
        }
        next_due += 1e6 / options.rate;
    }
}

static void start_waiting(int64_t t)
{
    for (int i = 0; i < options.conns; i++) {
        if (conns[i].start_at && conns[i].start_at <= t)
            start_request(&conns[i], t, t);
    }
}

static int wait_for_events(struct epoll_event *events, int64_t t)
{
    int64_t until = t + 100000;
    if (open_loop)
        until = (int64_t)next_due;
    else if (waiting)
        until = t + 1000;
    int64_t wait = until > t ? until - t : 0;
    struct timespec timeout = {wait / 1000000, wait % 1000000 * 1000};
    return epoll_pwait2(poller, events, MAX_EVENTS, &timeout, NULL);
}

static void run(void)
{
    static struct epoll_event events[MAX_EVENTS];
    int64_t t;
    while ((t = now_us()) < measure_to) {
        if (open_loop)
            start_open(t);
        else if (waiting)
            start_waiting(t);
        int count = wait_for_events(events, t);
        for (int i = 0; i < count; i++)
            on_ready(events[i].data.ptr, events[i].events);
    }
}

/* The whole program */

static void make_request(void)
{
    char *padding = malloc(options.padding + 1), *body, seed[32] = "";
    memset(padding, 'x', options.padding);
    padding[options.padding] = 0;
    if (options.seed)
        sprintf(seed, ",\"seed\":%ld", options.seed);
    int body_length = asprintf(
        &body,
        "{\"model\":\"%s\",\"messages\":[{\"role\":\"system\",\"content\":\"You are a helpful assistant.\"},"
        "{\"role\":\"user\",\"content\":\"Hello there, please tell me something.%s\"}],"
        "\"temperature\":0.7,\"max_tokens\":%ld%s%s}",
        options.model, padding, options.max_tokens,
        streaming ? ",\"stream\":true,\"stream_options\":{\"include_usage\":true}" : "", seed);
    request_length = asprintf(
        &request,
        "POST %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nAuthorization: Bearer %s\r\n"
        "Content-Type: application/json\r\n%s%sContent-Length: %d\r\n\r\n%s",
        options.path, options.port, options.key, options.header, *options.header ? "\r\n" : "", body_length, body);
    free(padding);
    free(body);
}

/* Paced streams begin one after another over the first 60% of the warm-up, so that their tokens don't come in
 * step; all others at once. */
static void make_connections(int64_t t)
{
    conns = calloc(options.conns, sizeof *conns);
    for (int i = 0; i < options.conns; i++) {
        conns[i].fd = -1;
        if (!open_loop)
            start_later(&conns[i], t + (paced ? (int64_t)(i * options.warm_up * 0.6e6 / options.conns) : 0));
    }
    next_due = t;
}

static void report(void)
{
    sort(&latency);
    sort(&added);
    sort(&gap);
    sort(&first_token);
    printf("{\"mode\":\"%s\",\"c\":%d,\"reqs\":%ld,\"rps\":%.1f,\"non200\":%ld,\"err\":%ld,\"reconn\":%ld,"
           "\"lat50_us\":%.0f,\"lat99_us\":%.0f,\"evs\":%ld,\"eps\":%.0f,\"MBps\":%.2f,"
           "\"add50_us\":%.0f,\"add99_us\":%.0f,\"gap50_us\":%.0f,\"gap99_us\":%.0f,"
           "\"ttft50_us\":%.0f,\"ttft99_us\":%.0f}\n",
           options.mode, options.conns, requests, requests / options.seconds, not_200, errors, closed,
           percentile(&latency, .5), percentile(&latency, .99), tokens, tokens / options.seconds,
           body_bytes / options.seconds / 1e6, percentile(&added, .5), percentile(&added, .99),
           percentile(&gap, .5), percentile(&gap, .99), percentile(&first_token, .5),
           percentile(&first_token, .99));
}

static void raise_file_limit(void)
{
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max < 65536 ? files.rlim_max : 65536;
    setrlimit(RLIMIT_NOFILE, &files);
}

static void usage(void)
{
    fprintf(stderr, "usage: load -m ns|open|stream [-P port] [-c connections] [-d seconds] [-w seconds]\n"
                    "            [-r rate] [-n max_tokens] [-s seed] [-k key] [-u path] [-M model]\n"
                    "            [-x header] [-b bytes]\n");
    exit(2);
}

static void parse_options(int argc, char **argv)
{
    int option;
    while ((option = getopt(argc, argv, "P:c:d:w:m:r:n:s:k:u:M:x:b:")) > 0) {
        switch (option) {
        case 'P': options.port = atoi(optarg); break;
        case 'c': options.conns = atoi(optarg); break;
        case 'd': options.seconds = atof(optarg); break;
        case 'w': options.warm_up = atof(optarg); break;
        case 'm': options.mode = optarg; break;
        case 'r': options.rate = atof(optarg); break;
        case 'n': options.max_tokens = atol(optarg); break;
        case 's': options.seed = atol(optarg); break;
        case 'k': options.key = optarg; break;
        case 'u': options.path = optarg; break;
        case 'M': options.model = optarg; break;
        case 'x': options.header = optarg; break;
        case 'b': options.padding = atoi(optarg); break;
        default: usage();
        }
    }
    streaming = !strcmp(options.mode, "stream");
    open_loop = !strcmp(options.mode, "open");
    paced = streaming && options.seed > 0;
    bool known = streaming || open_loop || !strcmp(options.mode, "ns");
    if (!known || optind < argc || options.conns < 1 || options.seconds <= 0 || options.rate <= 0 ||
        options.padding < 0)
        usage();
}

int main(int argc, char **argv)
{
    parse_options(argc, argv);
    signal(SIGPIPE, SIG_IGN);
    prctl(PR_SET_TIMERSLACK, 1UL); /* or every wait takes 50 us longer */
    raise_file_limit();
    make_request();
    poller = epoll_create1(0);
    int64_t t = now_us();
    measure_from = t + (int64_t)(options.warm_up * 1e6);
    measure_to = measure_from + (int64_t)(options.seconds * 1e6);
    make_connections(t);
    run();
    report();
}
