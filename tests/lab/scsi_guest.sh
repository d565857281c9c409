# Runs in the stock guest of test_scsi.py. Steps that need the host wait for it: `result ready NAME` asks, and the session
# (scsi_session.py) answers by what it does to the VM.

signal() { # LUN: the host shows that it is done by a disk there
    wait_for "[ -e /sys/class/scsi_device/0:0:0:$1 ]"
}

at() { # LUN: the name of the block device there
    basename /sys/class/scsi_device/0:0:0:"$1"/device/block/*
}

DATA=$(at 0) LIMITED=$(at 1) FULL=$(at 2) BROKEN=$(at 3) CD=$(at 9)
QUEUE=/sys/block/$DATA/queue
result places "$DATA $LIMITED $FULL $BROKEN $CD"
result channels "$(ls /sys/bus/vmbus/devices/*/channels -d | while read -r d; do ls "$d" | wc -l; done | sort -n | tail -1)"
result transfer "$(cat "$QUEUE/max_hw_sectors_kb")"
result discard "$(cat "$QUEUE/discard_max_bytes") $(cat "$QUEUE/discard_granularity")"
result opcodes "$(sg_opcodes --opcode=0x93 "/dev/$DATA" 2>&1 | grep -c 'Write same(16)')"

# Persistent reservations.
for step in '--out --register --param-sark=abc' '--out --reserve --param-rk=abc --prout-type=1' '--in --read-keys' \
    '--in --read-reservation' '--in --read-full-status' '--in --report-capabilities' \
    '--out --preempt --param-rk=abc --param-sark=abc --prout-type=8' '--out --release --param-rk=abc --prout-type=8' \
    '--out --clear --param-rk=abc'; do
    sg_persist $step "/dev/$DATA" >>/tmp/persist 2>&1 || result persist_failed "$step"
done
result persist_keys "$(grep -c '0xabc' /tmp/persist)"
sg_persist --out --register --param-sark=abc --param-aptpl "/dev/$DATA" >/tmp/aptpl 2>&1
result persist_aptpl "$?"

# Holes.
dd if=/dev/urandom of="/dev/$DATA" bs=1M count=4 oflag=direct 2>/dev/null
blkdiscard -o 1048576 -l 2097152 "/dev/$DATA" || result discard_failed 1
sg_write_same --16 --unmap --in=/dev/zero --xferlen=512 --lba=6144 --num=1024 "/dev/$DATA" || result write_same_failed 1
result lba_status "$(sg_get_lba_status --lba=0 --maxlen=4096 --brief "/dev/$DATA" | grep ^0x | tr '\n' ',')"
result zeroed "$(dd if="/dev/$DATA" bs=512 skip=6144 count=1024 iflag=direct 2>/dev/null | tr -d '\0' | wc -c)"
sg_reset --host "/dev/$DATA" >/tmp/reset 2>&1
result reset "$?"

# The write cache.
CACHE=$(echo "/sys/block/$DATA/device/scsi_disk/"*/cache_type)
echo 'write through' >"$CACHE"
result write_through "$(cat "$CACHE") $(cat "$QUEUE/write_cache")"
result ready flushes
signal 20
dd if=/dev/zero of="/dev/$DATA" bs=4k count=16 oflag=direct 2>/dev/null
echo 'write back' >"$CACHE"
result write_back "$(cat "$CACHE")"

# Growing, while nothing uses the disk.
result ready resize
wait_for '[ "$(blockdev --getsize64 "/dev/$DATA")" = 100663296 ]' && result resized 1
echo grown | dd of="/dev/$DATA" bs=512 seek=196607 conv=sync oflag=direct 2>/dev/null && result grown_written 1

# A limit of 1 MiB/s, beside which the other disks go on.
begin=$(cut -d' ' -f1 /proc/uptime)
dd if="/dev/$LIMITED" of=/dev/null bs=256k count=16 iflag=direct 2>/dev/null &
limited=$!
sleep 0.5
dd if="/dev/$DATA" of=/dev/null bs=4k count=64 iflag=direct 2>/dev/null && kill -0 $limited && result overtaken 1
wait $limited
result limited "$begin $(cut -d' ' -f1 /proc/uptime)"

# CDs.
blockdev --getsize64 "/dev/$CD" >/dev/null
mount -t iso9660 -o ro "/dev/$CD" /mnt && result cd "$(cat /mnt/letter.txt)"
result ready eject-locked
signal 21
echo 3 >/proc/sys/vm/drop_caches
result cd_still "$(cat /mnt/letter.txt)"
umount /mnt
sg_start --eject "/dev/$CD" && result cd_opened "$(sg_turs "/dev/$CD" >/dev/null 2>&1; echo $?)"
result ready insert
signal 26
mount -t iso9660 -o ro "/dev/$CD" /mnt && result cd_second "$(cat /mnt/letter.txt)"
umount /mnt
result ready eject
wait_for '! sg_turs "/dev/$CD" >/dev/null 2>&1 && ! dd if="/dev/$CD" of=/dev/null bs=2k count=1 2>/dev/null' && result cd_gone 1

# The host's file system is full.
if dd if=/dev/zero of="/dev/$FULL" bs=1M count=24 oflag=direct 2>/tmp/full; then
    result full 'no error'
else
    result full "$(grep -o 'No space left on device' /tmp/full)"
fi
dd if=/dev/zero of="/dev/$FULL" bs=4k count=1 oflag=direct conv=notrunc 2>/dev/null && result full_survived 1

# The image is truncated underneath, and mended.
result ready truncate
signal 22
if dd if="/dev/$BROKEN" of=/dev/null bs=4k skip=2048 count=16 iflag=direct 2>/tmp/broken; then
    result broken 'no error'
else
    result broken "$(dmesg | grep "dev $BROKEN" | grep -o 'critical medium error' | head -1)"
fi
dd if="/dev/$BROKEN" of=/dev/null bs=4k count=16 iflag=direct 2>/dev/null && result broken_start_readable 1
result ready mend
signal 23
dd if="/dev/$BROKEN" of=/dev/null bs=4k skip=2048 count=16 iflag=direct 2>/dev/null && result mended 1

# Disks come and go under load on this one and on them.
while :; do dd if="/dev/$DATA" of=/dev/null bs=64k count=64 iflag=direct 2>/dev/null || result load_failed 1; done &
load=$!
while :; do dd if=/dev/"$(at 24)" of=/dev/null bs=64k count=64 iflag=direct 2>/dev/null || sleep 0.1; done &
unlucky=$!
result ready hot
signal 25 && result hot 1
wait_for '[ ! -e /sys/class/scsi_device/0:0:0:24 ]' && result hot_gone 1
kill $load $unlucky

result taint "$(cat /proc/sys/kernel/tainted)"
result ready shutdown
sleep 100
