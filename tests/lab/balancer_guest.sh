# A web server that says who it is: net.address=IP/LENGTH and net.name=NAME on the kernel's command line.

for word in $(cat /proc/cmdline); do
    case $word in
        net.address=*) address=${word#*=} ;;
        net.name=*) name=${word#*=} ;;
    esac
done
wait_for '[ -e /sys/class/net/eth0 ]'
ip link set lo up
ip address add "$address" dev eth0
ip link set eth0 up
mkdir /www
echo "$name" > /www/name
dd if=/dev/urandom of=/www/large bs=64k count=64 2>/dev/null
httpd -h /www
ping -c 1 -W 30 192.168.77.1 > /dev/null
result sum "$(sha256sum < /www/large | cut -d ' ' -f 1)"
result ready "$(basename "$(readlink /sys/class/net/eth0/device/driver)")"
while :; do sleep 1000; done
