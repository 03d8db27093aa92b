# SPDX-License-Identifier: Apache-2.0
# What XDP, tc and cgroup tools need, for network namespaces and cgroups that
# belong to the user.

[Profile]
Description=Observe and steer packets in network namespaces and cgroups of your own
Lease=8h

[Delegate]
Commands=map_create prog_load btf_load
Maps=@basic @network
Programs=@basic @network
Attachments=@basic @network

[Guard]
# Without CAP_PERFMON no program can read the kernel's memory.
Capabilities=CAP_BPF CAP_NET_ADMIN
MaxPrograms=256
MaxMaps=1024
MaxMapBytes=256M

[Attach]
Interfaces=own
Cgroups=own
