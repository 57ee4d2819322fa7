/* Dropped packets: exact counts by network namespace and reason; an event for each that is kept.
 *
 * Hook: tracepoint kfree_skb (skb, location, reason) with typed arguments (5.5); from Linux 5.17 with the reason.
 * Cost: per dropped packet one counter; see README.md. A packet that is consumed does not pass here (consume_skb), or is left
 * out by its reason.
 * Namespace: of the device that the packet is on; where it is on none (queued in a socket), of its socket.
 */
#include "common.h"

struct drop_event {
    struct event head;
    u64 location; /* address in the kernel of whoever dropped it */
    u32 reason;
    u32 ifindex;
    u64 device[2]; /* its name: 16 characters */
    u16 protocol; /* EtherType, host order */
    u16 pad[3];
    struct flow flow;
};

/* Addresses and ports of an IPv4 or IPv6 packet whose network header is known; of IPv6, extension headers are not followed. */
#ifdef HAVE_CAST
INLINE void flow_of_packet(struct sk_buff *skb, u16 protocol, struct flow *flow) {
    const unsigned char *at = skb->head + skb->network_header;
    if (protocol == 0x0800) {
        const u8 *header = cast(at, BTF_ID_iphdr);
        flow->family = 2;
        flow->protocol = header[9];
        address4(flow->source, *(u32 *)(header + 12));
        address4(flow->destination, *(u32 *)(header + 16));
        at += (header[0] & 15) * 4;
    } else if (protocol == 0x86dd) {
        const u8 *header = cast(at, BTF_ID_ipv6hdr);
        const u32 *own = (const u32 *)(header + 8), *peer = (const u32 *)(header + 24);
        flow->family = 10;
        flow->protocol = header[6];
        address6(flow->source, own[0], own[1], own[2], own[3]);
        address6(flow->destination, peer[0], peer[1], peer[2], peer[3]);
        at += 40;
    } else {
        return;
    }
    if (flow->protocol == 6 || flow->protocol == 17 || flow->protocol == 132) {
        const u16 *ports = cast(at, BTF_ID_udphdr);
        flow->source_port = bpf_ntohs(ports[0]);
        flow->destination_port = bpf_ntohs(ports[1]);
    }
}
#else
/* In one read where IPv4 has no options. */
INLINE void flow_of_packet(struct sk_buff *skb, u16 protocol, struct flow *flow) {
    unsigned char *at = skb->head + skb->network_header;
    struct {
        u8 network[40];
        u16 ports[2];
    } __attribute__((aligned(8))) raw;
    u32 *words = (u32 *)raw.network;
    u16 *ports = raw.ports;
    if (protocol == 0x0800) {
        if (bpf_probe_read_kernel(&raw, 24, at))
            return;
        flow->family = 2;
        flow->protocol = raw.network[9];
        address4(flow->source, words[3]);
        address4(flow->destination, words[4]);
        ports = (u16 *)(raw.network + 20);
        if ((raw.network[0] & 15) != 5)
            bpf_probe_read_kernel(ports, 4, at + (raw.network[0] & 15) * 4);
    } else if (protocol == 0x86dd) {
        if (bpf_probe_read_kernel(&raw, sizeof(raw), at))
            return;
        flow->family = 10;
        flow->protocol = raw.network[6];
        for (u32 i = 0; i < 2; i++) {
            flow->source[i] = ((u64 *)raw.network)[1 + i];
            flow->destination[i] = ((u64 *)raw.network)[3 + i];
        }
    } else {
        return;
    }
    if (flow->protocol == 6 || flow->protocol == 17 || flow->protocol == 132) {
        flow->source_port = bpf_ntohs(ports[0]);
        flow->destination_port = bpf_ntohs(ports[1]);
    }
}
#endif

/* The namespace, and the device where the packet is on one. */
INLINE struct net *netns_of_packet(struct sk_buff *skb, struct netns_id *id, struct net_device **on) {
    struct net_device *device = skb->dev;
    struct net *net;
    struct sock *sk;
    if (device) {
        net = device->nd_net.net;
        if (netns_load_checked(net, id)) {
            *on = device;
            return net;
        }
    }
    sk = skb->sk;
    if (!sk)
        return 0;
    net = sk->__sk_common.skc_net.net;
    return netns_load_checked(net, id) ? net : 0;
}

INLINE int dropped(struct sk_buff *skb, u64 location, u32 reason, u64 nothing) {
    struct count_key key = {.counter = COUNT_DROPS, .what = reason};
    struct subject about = {};
    struct net_device *device = 0;
    struct net *net = netns_of_packet(skb, &about.netns, &device);
    struct drop_event *event;
    u16 protocol = bpf_ntohs(skb->protocol);
    u64 on_device;
    if (!device && !protocol) /* a message of a Unix or netlink socket, no packet */
        return 0;
    key.netns = about.netns;
    if (SELDOM(count(&key, &about.slot)) && net)
        netns_note(net, &key.netns);
    on_device = !!device + nothing;
    flow_of_packet(skb, protocol, &about.flow);
    event = event_reserve(&about, (struct sort){PACKET_DROP, WHO_IS_NOBODY, about.flow.family, 1}, sizeof(*event));
    if (!event)
        return 0;
    device = on_device ? skb->dev : 0;
    event->flow = about.flow;
    event->location = location;
    event->reason = reason;
    event->protocol = protocol;
    event->pad[0] = event->pad[1] = event->pad[2] = 0;
    event->ifindex = device ? device->ifindex : 0;
    event->device[0] = device ? ((u64 *)device->name)[0] : 0;
    event->device[1] = device ? ((u64 *)device->name)[1] : 0;
    event_submit(event, &about);
    return 0;
}

int drops_with_reason(unsigned long long *ctx) {
    u32 reason = ctx[2];
    if (reason == REASON_NOT_DROPPED || reason == REASON_CONSUMED)
        return 0;
    return dropped(ARGUMENT(sk_buff, ctx[0]), ctx[1], reason, NOTHING(ctx[1]));
}

int drops_without_reason(unsigned long long *ctx) {
    return dropped(ARGUMENT(sk_buff, ctx[0]), ctx[1], REASON_NOT_SPECIFIED, NOTHING(ctx[1]));
}
