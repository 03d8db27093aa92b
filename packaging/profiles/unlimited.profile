# SPDX-License-Identifier: Apache-2.0
# Everything that can be delegated, on the whole host: as good as root. The
# lease and the numbers are its only limits.

[Profile]
Description=Everything, on the whole host
Lease=1h

[Delegate]
Commands=any
Maps=any
Programs=any
Attachments=any

[Guard]
Capabilities=CAP_BPF CAP_NET_ADMIN CAP_PERFMON CAP_SYS_ADMIN
MaxPrograms=1024
MaxMaps=4096
MaxMapBytes=1G

[Attach]
Interfaces=any
Cgroups=any
Processes=any
