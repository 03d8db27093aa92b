# SPDX-License-Identifier: Apache-2.0
# Maps, and programs that see only what passes the user's own sockets.

[Profile]
Description=Maps, and programs for sockets of your own
Lease=8h

[Delegate]
Commands=map_create prog_load btf_load
Maps=@basic
Programs=@basic
Attachments=@basic

[Guard]
# Without CAP_PERFMON no program can read the kernel's memory.
# CAP_NET_ADMIN is for sk_skb, sk_msg and their maps.
Capabilities=CAP_BPF CAP_NET_ADMIN
MaxPrograms=64
MaxMaps=256
MaxMapBytes=64M
