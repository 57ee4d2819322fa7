/* TCP per network namespace: connections opened and failed, time to connect, retransmits, resets.
 *
 * Hooks, all tracepoints with typed arguments (5.5): inet_sock_set_state (sk, old, new; 4.16), tcp_retransmit_skb (sk, skb; 4.15),
 * tcp_send_reset (sk, skb; 4.15: before 6.10 only where the kernel has a socket for it).
 * Cost: per connection about five changes of state, three of which look into a hash; nothing per packet. See README.md.
 * Outgoing: SYN_SENT to ESTABLISHED is opened, SYN_SENT to CLOSE is failed (refused, timed out, given up).
 * Incoming: SYN_RECV to ESTABLISHED is opened, SYN_RECV to CLOSE is failed; a SYN that never got a socket is neither.
 */
#include "common.h"

enum tcp_count { OPENED_OUT, OPENED_IN, FAILED_OUT, FAILED_IN, RETRANSMITTED, RESET_SENT }; /* IN follows OUT */
enum tcp_state { ESTABLISHED = 1, SYN_SENT = 2, SYN_RECV = 3, CLOSED = 7 };
enum tcp_kind { KIND_OPENED = 1, KIND_FAILED, KIND_RETRANSMITTED, KIND_RESET_SENT, KIND_CLOSED };
enum tcp_direction { INCOMING, OUTGOING };

/* Counts per bucket (not cumulative, the last is +Inf's), then the sum of all in ns. */
struct connect_time {
    u64 counts[CONNECT_BUCKETS + 1];
    u64 sum;
};

/* To make an entry of a hash and to take it out costs more than all the rest, and the kernel gives a socket's memory to the
 * next socket: so an entry stays, as an idle one (time 0), for whoever comes after, unless half of its map is taken. */
enum tcp_entries { ENTRIES_CONNECTING, ENTRIES_OPEN };

/* Who asked for a connection, and when. */
struct tcp_connecting {
    u64 time;
    u32 pid; /* 0: nobody wants to know */
    u32 pad;
    struct comm comm;
};

struct tcp_opened {
    u64 time;
    u32 direction;
    u32 pad;
};

SHAPE(tcp_connect, struct netns_id, struct connect_time);
SHAPE(tcp_fresh, u32, struct connect_time); /* all 0 */
SHAPE(tcp_connecting, u64, struct tcp_connecting);
SHAPE(tcp_entries, u32, u64);
SHAPE(tcp_open, u64, struct tcp_opened);

struct tcp_event {
    struct event head;
    struct flow flow; /* source is the local side */
    u64 duration;     /* ns: to connect; of the whole connection where it is closed; 0: not known */
    u64 sent;         /* bytes, where it is closed */
    u64 received;
    u32 direction;
    u32 state; /* before */
};

INLINE void flow_of_socket(const struct sock *sk, struct flow *flow) {
    flow->family = sk->__sk_common.skc_family;
    flow->source_port = sk->__sk_common.skc_num;
    flow->destination_port = bpf_ntohs(sk->__sk_common.skc_dport);
    flow->protocol = 6;
    if (flow->family == 2) {
        address4(flow->source, sk->__sk_common.skc_rcv_saddr);
        address4(flow->destination, sk->__sk_common.skc_daddr);
    }
#ifdef HAVE_sock___sk_common_skc_v6_daddr
    else {
        const u32 *own = (const u32 *)&sk->__sk_common.skc_v6_rcv_saddr, *peer = (const u32 *)&sk->__sk_common.skc_v6_daddr;
        address6(flow->source, own[0], own[1], own[2], own[3]);
        address6(flow->destination, peer[0], peer[1], peer[2], peer[3]);
    }
#endif
}

INLINE struct net *netns_of_socket(const struct sock *sk, struct netns_id *id) {
    struct net *net = sk->__sk_common.skc_net.net;
    netns_load(net, id);
    return net;
}

INLINE void count_tcp(struct net *net, struct subject *about, u32 what) {
    struct count_key key = {.netns = about->netns, .counter = COUNT_TCP, .what = what};
    if (SELDOM(count(&key, &about->slot)))
        netns_note(net, &key.netns);
}

INLINE void observe_connect(const struct netns_id *id, u64 duration) {
    static const u64 bounds[CONNECT_BUCKETS] = {CONNECT_BOUNDS};
    struct netns_id key = *id;
    struct connect_time *times = map_lookup(MAP(tcp_connect), &key);
    u32 slot = 0;
    if (!times) {
        struct connect_time *fresh = map_lookup(MAP(tcp_fresh), &slot);
        if (fresh)
            map_update(MAP(tcp_connect), &key, fresh, 1);
        times = map_lookup(MAP(tcp_connect), &key);
        if (!times) {
            insert_failed(MAP_ID_tcp_connect);
            return;
        }
    }
#pragma unroll
    for (int i = 0; i < CONNECT_BUCKETS; i++)
        slot += (bounds[i] - duration) >> 63; /* 1 where it is longer: no branch, which the verifier would follow */
    if (slot <= CONNECT_BUCKETS)
        RAISE(times->counts[slot], 1);
    RAISE(times->sum, duration);
}

struct tcp_change {
    struct subject about;
    u32 direction;
    u32 state;
    u64 since; /* when what ends here began; 0: not known */
};

INLINE void tell(const struct sock *sk, struct tcp_change *change, struct sort sort, u64 nothing) {
    struct tcp_event *event;
    if (sk)
        flow_of_socket(sk, &change->about.flow);
    sort.class += nothing;
    sort.family = change->about.flow.family + nothing;
    change->about.kind += nothing;
    change->about.pid += nothing;
    change->about.comm.words[0] += nothing;
    change->about.comm.words[1] += nothing;
    change->direction += nothing;
    event = event_reserve(&change->about, sort, sizeof(*event));
    if (!event)
        return;
    event->flow = change->about.flow;
    event->duration = change->since ? event->head.time - change->since : 0;
    event->sent = 0;
    event->received = 0;
    event->direction = change->direction;
    event->state = change->state;
#if defined(HAVE_tcp_sock_bytes_acked) && defined(HAVE_tcp_sock_bytes_received)
    if (change->about.kind == KIND_CLOSED) {
        struct tcp_sock *tp = (struct tcp_sock *)sk;
        READ(event->sent, tp->bytes_acked);
        READ(event->received, tp->bytes_received);
    }
#endif
    event_submit(event, &change->about);
}

/* Whether records of a class are wanted at all. */
INLINE int wanted(u32 class) {
    u32 *ratio = map_lookup(MAP(ratios), &class);
    return ratio && *ratio;
}

/* 0: the map is full. The changes of a socket come one after the other, under its lock: nobody else writes its entry. */
INLINE int entry_made(void *map, u32 which, u64 key, const void *value) {
    u64 *entries = map_lookup(MAP(tcp_entries), &which);
    if (map_update(map, &key, value, 0))
        return 0;
    if (entries)
        RAISE(*entries, 1);
    return 1;
}

INLINE void entry_idle(void *map, u32 which, u64 key, u64 *time) {
    u64 *entries = map_lookup(MAP(tcp_entries), &which);
    *time = 0;
    if (entries && *entries > ENTRIES_KEPT && !map_delete(map, &key))
        RAISE(*entries, -1);
}

INLINE void asked(u64 key) {
    struct tcp_connecting now = {.time = bpf_ktime_get_ns()};
    struct tcp_connecting *entry = map_lookup(MAP(tcp_connecting), &key);
    if (wanted(TCP_FAULT) || wanted(CONNECTION)) {
        now.pid = tgid_of_current();
        comm_of_current(&now.comm);
    }
    if (entry)
        *entry = now;
    else if (!entry_made(MAP(tcp_connecting), ENTRIES_CONNECTING, key, &now))
        insert_failed(MAP_ID_tcp_connecting);
}

/* Notes who asked, and when. 0: nobody did. */
INLINE int answered(u64 key, struct tcp_change *change) {
    struct tcp_connecting *entry = map_lookup(MAP(tcp_connecting), &key);
    if (!entry || !entry->time)
        return 0;
    change->since = entry->time;
    if (entry->pid) {
        change->about.who = WHO_IS_KNOWN;
        change->about.pid = entry->pid;
        change->about.comm = entry->comm;
    }
    entry_idle(MAP(tcp_connecting), ENTRIES_CONNECTING, key, &entry->time);
    return 1;
}

INLINE void opened(u64 key, struct tcp_change *change) {
    u64 now = bpf_ktime_get_ns();
    if (change->direction == OUTGOING)
        observe_connect(&change->about.netns, change->since ? now - change->since : 0);
    if (wanted(CONNECTION_CLOSE)) {
        struct tcp_opened since = {.time = now, .direction = change->direction};
        struct tcp_opened *entry = map_lookup(MAP(tcp_open), &key);
        if (entry)
            *entry = since;
        else
            entry_made(MAP(tcp_open), ENTRIES_OPEN, key, &since);
    }
    change->about.class = CONNECTION;
    change->about.kind = KIND_OPENED;
}

/* 0: nobody wanted to know when it was opened. */
INLINE int closed(u64 key, struct tcp_change *change) {
    struct tcp_opened *entry = map_lookup(MAP(tcp_open), &key);
    if (!entry || !entry->time)
        return 0;
    change->since = entry->time;
    change->direction = entry->direction;
    entry_idle(MAP(tcp_open), ENTRIES_OPEN, key, &entry->time);
    change->about.class = CONNECTION_CLOSE;
    change->about.kind = KIND_CLOSED;
    return 1;
}

int tcp_state(unsigned long long *ctx) {
    const struct sock *sk = ARGUMENT(sock, ctx[0]);
    u32 before = ctx[1], after = ctx[2];
    u64 key = (u64)sk;
    struct tcp_change change = {.about = {.who = WHO_IS_NOBODY}, .state = before, .direction = INCOMING};
    struct net *net;
    if (after != SYN_SENT && after != ESTABLISHED && after != CLOSED)
        return 0;
    if (sk->sk_protocol != 6)
        return 0;
    if (after == SYN_SENT) {
        asked(key);
        return 0;
    }
    if (before == SYN_SENT || before == SYN_RECV) {
        if (answered(key, &change) || before == SYN_SENT)
            change.direction = OUTGOING;
        net = netns_of_socket(sk, &change.about.netns);
        change.about.class = TCP_FAULT;
        change.about.kind = KIND_FAILED;
        if (after == ESTABLISHED)
            opened(key, &change);
        count_tcp(net, &change.about, (after == ESTABLISHED ? OPENED_OUT : FAILED_OUT) + (change.direction == INCOMING));
    } else {
        if (after != CLOSED || !closed(key, &change))
            return 0;
        netns_of_socket(sk, &change.about.netns);
    }
    tell(sk, &change, (struct sort){change.about.class, change.about.who}, NOTHING(ctx[1]));
    return 0;
}

int tcp_retransmit(unsigned long long *ctx) {
    const struct sock *sk = ARGUMENT(sock, ctx[0]);
    struct tcp_change change = {.direction = OUTGOING};
    struct net *net;
    if (!sk)
        return 0;
    change.about.kind = KIND_RETRANSMITTED;
    net = netns_of_socket(sk, &change.about.netns);
    count_tcp(net, &change.about, RETRANSMITTED);
    tell(sk, &change, (struct sort){TCP_FAULT, WHO_IS_NOBODY}, NOTHING(change.about.netns.cookie));
    return 0;
}

/* A reset that answers a packet for which there is no socket has the packet alone: it stands on a device. */
int tcp_reset(unsigned long long *ctx) {
    const struct sock *sk = ARGUMENT(sock, ctx[0]);
    struct sk_buff *skb = ARGUMENT(sk_buff, ctx[1]);
    struct tcp_change change = {.direction = OUTGOING};
    struct net *net = 0;
    change.about.kind = KIND_RESET_SENT;
    if (sk) {
        net = netns_of_socket(sk, &change.about.netns);
    } else if (skb) {
        struct net_device *device = skb->dev;
        if (device && netns_load_checked(device->nd_net.net, &change.about.netns))
            net = device->nd_net.net;
    }
    count_tcp(net, &change.about, RESET_SENT);
    tell(sk, &change, (struct sort){TCP_FAULT, WHO_IS_NOBODY}, NOTHING(change.about.netns.cookie));
    return 0;
}
