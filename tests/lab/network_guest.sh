# What stock guests with NICs have beside what all share.

ip link set lo up
# Replies by the interface that has the address, and only for that one: several NICs are on one network.
echo 1 >/proc/sys/net/ipv4/conf/all/arp_ignore
echo 2 >/proc/sys/net/ipv4/conf/all/arp_announce

nic() { # MAC: the interface that has it
    for interface in /sys/class/net/*; do
        [ "$(cat "$interface/address")" = "$1" ] && basename "$interface"
    done
}

name() { # MAC NAME: gives the interface that name once it is there
    wait_for "[ -n \"\$(nic $1)\" ]" && ip link set "$(nic "$1")" name "$2" && ip link set "$2" up
}

lease() { # INTERFACE: its address by DHCP
    udhcpc -i "$1" -n -q -t 5 -T 2 -s /bin/udhcpc.script 2>/dev/null
}
