# SPDX-License-Identifier: Apache-2.0
# Programs that read processes and the kernel, and change nothing.

[Profile]
Description=Trace processes and the kernel
Lease=1h

[Delegate]
Commands=map_create prog_load btf_load
Maps=@basic @tracing
# Loaders try out the kernel with socket filters.
Programs=socket_filter @tracing
Attachments=@tracing

[Guard]
Capabilities=CAP_BPF CAP_PERFMON
Helpers=~probe_write_user ~override_return ~send_signal ~send_signal_thread
Kfuncs=~bpf_send_signal_task ~bpf_sock_destroy
MaxPrograms=256
MaxMaps=1024
MaxMapBytes=256M

[Attach]
Processes=own
