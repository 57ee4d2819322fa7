/* Self-proof: what a program reads through the offsets it was compiled with, for comparison with what user space knows.
 *
 * Hook: none. The loader runs it once on itself (BPF_PROG_TEST_RUN of a raw tracepoint program, kernel 5.10) before
 * anything is attached. Slots of the map `proof` are those of FACTS in proof.py; 0 is "not read".
 */
#include "common.h"

enum slot {
    TGID_BY_HELPER,
    TGID,
    ENV_START,
    COOKIE,
    INUM,
    PROC_INO,
    LO_INDEX,
    LO_NAME,
    LO_NETNS,
    SK_FAMILY,
    SK_PORT,
    SK_PEER_PORT,
    SK_PROTOCOL,
    SK_NETNS,
    SK_ADDRESS,
    SKB_LENGTH,
    SKB_PORT,
    SKB_ADDRESS,
    PARENT_TGID,
    LEADER_PID,
    CGROUP_BY_HELPER,
    CGROUP,
    SLOTS
};

SHAPE(proof, u32, u64);

INLINE void say(u32 slot, u64 value) {
    map_update(MAP(proof), &slot, &value, 0);
}

INLINE void constant_is(u32 slot, u64 value) {
    map_update(MAP(constants), &slot, &value, 0);
}

INLINE void prove_task(struct task_struct *task) {
#ifdef HAVE_task_struct_tgid
    u32 tgid = 0;
    READ(tgid, task->tgid);
    say(TGID_BY_HELPER, bpf_get_current_pid_tgid() >> 32);
    say(TGID, tgid);
#endif
#ifdef HAVE_task_struct_group_leader
    struct task_struct *leader = 0;
    u32 pid = 0;
    READ(leader, task->group_leader);
    READ(pid, leader->pid);
    say(LEADER_PID, pid);
#endif
#if defined(HAVE_css_set_dfl_cgrp) && defined(HAVE_kernfs_node_id)
    struct css_set *groups = 0;
    struct cgroup *group = 0;
    struct kernfs_node *directory = 0;
    u64 id = 0;
    READ(groups, task->cgroups);
    READ(group, groups->dfl_cgrp);
    READ(directory, group->kn);
    READ(id, directory->id);
    say(CGROUP_BY_HELPER, bpf_get_current_cgroup_id());
    say(CGROUP, id);
#endif
#ifdef HAVE_task_struct_real_parent
    struct task_struct *parent = 0;
    u32 parent_tgid = 0;
    READ(parent, task->real_parent);
    READ(parent_tgid, parent->tgid);
    say(PARENT_TGID, parent_tgid);
    constant_is(EXPORTER_TGID, parent_tgid);
#endif
#ifdef HAVE_mm_struct_env_start
    struct mm_struct *mm = 0;
    unsigned long start = 0;
    READ(mm, task->mm);
    READ(start, mm->env_start);
    say(ENV_START, start);
#endif
}

INLINE void prove_netns(struct net *net) {
    struct netns_id id;
    u64 operations = 0;
    u32 zero = 0;
    netns_read(net, &id);
    say(INUM, id.inum);
    say(COOKIE, id.cookie);
    READ(operations, net->ns.ops);
    map_update(MAP(constants), &zero, &operations, 0);
#ifdef HAVE_proc_dir_entry_low_ino
    struct proc_dir_entry *entry = 0;
    u32 number = 0;
    READ(entry, net->proc_net_stat);
    READ(number, entry->low_ino);
    say(PROC_INO, number);
#endif
#ifdef HAVE_net_loopback_dev
    struct net_device *lo = 0;
    struct net *back = 0;
    int index = 0;
    u64 name = 0;
    READ(lo, net->loopback_dev);
    READ(index, lo->ifindex);
    say(LO_INDEX, index);
    bpf_probe_read_kernel(&name, sizeof(name), &lo->name);
    say(LO_NAME, name);
    READ(back, lo->nd_net.net);
    say(LO_NETNS, back == net);
#endif
}

#if defined(HAVE_sk_buff_head) && defined(HAVE_sk_buff_transport_header)
INLINE void prove_packet(struct sk_buff *skb) {
    unsigned char *head = 0;
    u32 length = 0, address = 0;
    u16 transport = 0, network = 0, port = 0;
    READ(length, skb->len);
    READ(head, skb->head);
    READ(transport, skb->transport_header);
    READ(network, skb->network_header);
    bpf_probe_read_kernel(&port, sizeof(port), head + transport + 2); /* struct udphdr.dest, RFC 768 */
    bpf_probe_read_kernel(&address, sizeof(address), head + network + 16); /* struct iphdr.daddr, RFC 791 */
    say(SKB_LENGTH, length);
    say(SKB_PORT, bpf_ntohs(port));
    say(SKB_ADDRESS, address);
}
#endif

#if defined(HAVE_socket_sk) && defined(HAVE_file_private_data) && defined(HAVE_sock___sk_common_skc_net_net)
INLINE void prove_socket(struct task_struct *task, struct net *net, u64 number) {
    struct files_struct *files = 0;
    struct fdtable *table = 0;
    struct file **descriptors = 0, *file = 0;
    struct socket *socket = 0;
    struct sock *sk = 0;
    struct net *sk_net = 0;
    u16 family = 0, port = 0, peer = 0, protocol = 0;
    u32 address = 0;
    READ(files, task->files);
    READ(table, files->fdt);
    READ(descriptors, table->fd);
    bpf_probe_read_kernel(&file, sizeof(file), descriptors + number);
    bpf_probe_read_kernel(&socket, sizeof(socket), &file->private_data);
    READ(sk, socket->sk);
    READ(family, sk->__sk_common.skc_family);
    READ(port, sk->__sk_common.skc_num);
    READ(peer, sk->__sk_common.skc_dport);
    READ(address, sk->__sk_common.skc_daddr);
    READ(protocol, sk->sk_protocol);
    READ(sk_net, sk->__sk_common.skc_net.net);
    say(SK_FAMILY, family);
    say(SK_PORT, port);
    say(SK_PEER_PORT, bpf_ntohs(peer));
    say(SK_PROTOCOL, protocol);
    say(SK_ADDRESS, address);
    say(SK_NETNS, sk_net == net);
#if defined(HAVE_sk_buff_head) && defined(HAVE_sk_buff_transport_header)
    struct sk_buff *skb = 0;
    READ(skb, sk->sk_receive_queue.next);
    prove_packet(skb);
#endif
}
#endif

int proof_values(struct bpf_raw_tracepoint_args *ctx) {
    struct task_struct *task = (struct task_struct *)bpf_get_current_task();
    struct net *net = netns_of_current();
    prove_task(task);
    prove_netns(net);
#if defined(HAVE_socket_sk) && defined(HAVE_file_private_data) && defined(HAVE_sock___sk_common_skc_net_net)
    prove_socket(task, net, ctx->args[0]);
#endif
    return 0;
}
