# Runs in the stock guest of test_hyperv.py. Steps that need the host wait for it: `result ready NAME` asks, and the
# session (hyperv_session.py) answers by what it does to the VM.

DATA=$(disk_of 262144)
mkdir -p /mnt
if mount -t ext4 "/dev/$DATA" /mnt 2>/dev/null; then
    result second_boot "$(cat /mnt/note)"
    result second_sum "$(sha256sum /mnt/data | cut -d' ' -f1)"
    result ready shutdown
    sleep 100
    result disobeyed 1
    exit
fi

dmesg | grep -o 'Hypervisor detected: .*' | while read -r line; do result detected "$line"; done
result vmbus "$(dmesg | grep -o 'Vmbus version:.*')"
result clocksource "$(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
result cpus "$(grep -c ^processor /proc/cpuinfo)"
result taint "$(cat /proc/sys/kernel/tainted)"
for device in /sys/bus/vmbus/devices/*; do
    result "channel_$(cat "$device/class_id" | tr -d '{}')_$(basename "$device")" \
        "$(basename "$(readlink "$device/driver")") $(ls "$device/channels" | wc -l)"
done
for block in /sys/block/sd*; do
    result "disk_$(cat "$block/size")" "$(readlink -f "$block/device" | grep -o '[0-9]*:[0-9]*:[0-9]*:[0-9]*$') ro=$(cat "$block/ro")"
done

mkfs.ext4 -q -F "/dev/$DATA" && mount -t ext4 "/dev/$DATA" /mnt || result mkfs failed
dd if=/dev/urandom of=/mnt/data bs=1M count=64 2>/dev/null
echo 'written by the guest' >/mnt/note
sync
echo 3 >/proc/sys/vm/drop_caches
result sum "$(sha256sum /mnt/data | cut -d' ' -f1)"
result size "$(stat -c %s /mnt/data)"
umount /mnt

result ready hot-add
wait_for '[ -n "$(disk_of 40960)" ]' && result added "$(disk_of 40960)"
dd if=/dev/zero of="/dev/$(disk_of 40960)" bs=64k count=16 2>/dev/null && sync && result added_written 1
result ready hot-remove
wait_for '[ -z "$(disk_of 40960)" ]' && result removed 1

result ready pause
# The session stops the VM for 10 s somewhere in here.
for _ in $(seq 150); do
    /bin/date '+RESULT clock=%s.%N'
    sleep 0.1
done

result ready reset
sleep 100
