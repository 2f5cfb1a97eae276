#!/bin/sh
# What a host of Origin needs of its kernel, SELinux and firewall; run at every boot, and again at will.
# What this host does not have is passed over.
PATH=/usr/sbin:/usr/bin:/sbin:/bin
TCP="${open_tcp}"
UDP="${open_udp}"

has() { command -v "$$1" >/dev/null 2>&1; }

sysctl -q -p /etc/sysctl.d/99-openshift.conf

if has selinuxenabled && selinuxenabled; then
    for boolean in container_manage_cgroup virt_use_nfs virt_sandbox_use_nfs virt_sandbox_use_fusefs; do
        setsebool -P "$$boolean" on
    done
fi

if has update-ca-trust; then update-ca-trust; fi

# allow PROTOCOL PORTS...: a range is FIRST:LAST
if has firewall-cmd && firewall-cmd --quiet --state; then
    allow() {
        protocol=$$1; shift
        for port in "$$@"; do
            port=$$(echo "$$port" | tr : -)
            firewall-cmd --quiet --permanent --add-port="$$port/$$protocol"
            firewall-cmd --quiet --add-port="$$port/$$protocol"
        done
    }
elif has iptables; then
    # In a chain of its own, as openshift-ansible has it; other rules stay.
    iptables -w -N OS_FIREWALL_ALLOW 2>/dev/null || iptables -w -F OS_FIREWALL_ALLOW
    iptables -w -C INPUT -j OS_FIREWALL_ALLOW 2>/dev/null || iptables -w -I INPUT -j OS_FIREWALL_ALLOW
    allow() {
        protocol=$$1; shift
        for port in "$$@"; do
            iptables -w -A OS_FIREWALL_ALLOW -p "$$protocol" --dport "$$port" -j ACCEPT
        done
    }
else
    exit 0
fi
allow tcp $$TCP
allow udp $$UDP
