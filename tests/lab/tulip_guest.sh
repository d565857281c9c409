# Runs in the stock guest of test_tulip.py: its 21140s by the kernel's own driver, the first one with a network.

dhcp() {
    case $1 in
    bound) ip address add "$ip/24" dev "$interface" && result address "$ip" ;;
    esac
}
if [ "$1" ]; then # called by udhcpc
    dhcp "$1"
    exit
fi

carrier_is() { # NUMBER: up to 60 s
    wait_for "[ \"\$(cat /sys/class/net/eth0/carrier)\" = $1 ]"
}

sum_of() {
    sha256sum | cut -d' ' -f1
}

for nic in eth0 eth1; do
    device=$(readlink -f "/sys/class/net/$nic/device")
    result "${nic}_driver" "$(basename "$(readlink "$device/driver")")"
    result "${nic}_place" "$(basename "$device")"
    result "${nic}_mac" "$(cat "/sys/class/net/$nic/address")"
    result "${nic}_irq" "$(cat "$device/irq")"
done
result ethtool "$(ethtool -i eth0 | tr '\n' '|')"
ip link set lo up
ip link set eth0 up
ip link set eth1 up
udhcpc -i eth0 -f -q -n -t 10 -T 5 -s /script

host=10.77.0.1
result ping "$(ping -c 5 -q $host | grep -o '[0-9]* packets received')"
result large_ping "$(ping -c 2 -s 1472 -q $host | grep -o '[0-9]* packets received')"
result download "$(wget -q -O - http://$host:8000/data | sum_of)"
dd if=/dev/urandom of=/data bs=1M count=2 2>/dev/null
nc $host 8001 </data
result uploaded "$(sum_of </data)"

ip link add link eth0 name eth0.10 type vlan id 10
ip address add 10.77.10.2/24 dev eth0.10
ip link set eth0.10 up
result vlan_ping "$(ping -c 2 -s 1472 -q 10.77.10.1 | grep -o '[0-9]* packets received')"
ip link set eth0 promisc on
ping -c 1 -q $host >/dev/null && result promiscuous 1
ip link set eth0 promisc off

carrier_is 1
wait_for '[ "$(cat /sys/class/net/eth1/carrier)" = 0 ]' && result no_cable 1
result ready unplug
carrier_is 0 && result unplugged 1
carrier_is 1 && result plugged 1
result ping_again "$(ping -c 3 -q $host | grep -o '[0-9]* packets received')"
ip link set eth0 down
ip link set eth0 up
result ping_reopened "$(ping -c 3 -q $host | grep -o '[0-9]* packets received')"

result interrupts "$(grep -E 'eth[01]' /proc/interrupts | tr -s ' ' | tr '\n' '|')"
result log "$(dmesg | grep -i -E 'tulip|eth[01]|irq.*nobody' | head -n 30 | tr '\n' '|')"
result counts "$(cat /sys/class/net/eth0/statistics/rx_errors /sys/class/net/eth0/statistics/tx_errors | tr '\n' ' ')"
result end 1
