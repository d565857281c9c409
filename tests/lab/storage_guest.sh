# The system on the root disk of test_storage.py's guests. Steps that need the host wait for it: `result ready NAME` asks,
# and the session (storage_session.py) answers by what it does to the VM.

verified() { # NAME FILE SIZE: a mixed load, every block read back and its checksum compared
    fio --name="$1" --filename="$2" --size="$3" --rw=randrw --rwmixread=30 --bsrange=4k-256k --ioengine=libaio \
        --iodepth=16 --direct=1 --verify=crc32c --verify_backlog=64 --verify_fatal=1 --fsync=64 \
        --time_based --runtime="$SECONDS_OF_FIO" --output-format=normal >"/tmp/$1" 2>&1
    result "fio_$1" "$? $(grep -c 'verify:' "/tmp/$1")"
    result "fio_$1_io" "$(grep -E 'issued rwts' "/tmp/$1")"
    grep -iE 'error|bad' "/tmp/$1" | head -5
}

SECONDS_OF_FIO=$(sed 's/.*fio_seconds=\([0-9]*\).*/\1/' /proc/cmdline)
mount -t tmpfs tmpfs /tmp
ROOT=$(sed -n 's,^/dev/\(sd.\) / ext4 .*,\1,p' /proc/mounts)
result root "$ROOT"
result driver "$(cat "/sys/block/$ROOT/device/../../scsi_host/"*/proc_name)"
result taint "$(cat /proc/sys/kernel/tainted)"

if grep -q only_root /proc/cmdline; then
    verified root /load 64M
    rm /load
    exit
fi

if grep -q until_killed /proc/cmdline; then
    # Each block holds its own number; what is reported has been flushed. Blocks lie apart, so that most allocate.
    number=0
    while :; do
        yes "$number" | dd of="/dev/$(disk_of 786432)" bs=4k count=1 iflag=fullblock seek=$((number * 97)) \
            oflag=direct conv=fsync 2>/dev/null || break
        result flushed "$number"
        number=$((number + 1))
    done
    exit
fi

LOAD=/dev/$(disk_of 524288)
result load_sector "$(blockdev --getss "$LOAD")"
verified load "$LOAD" 256M &
LOADING=$!
dd if=/dev/urandom of=/mnt/file bs=1M count=16 2>/dev/null && sync
result root_sum "$(sha256sum /mnt/file | cut -d' ' -f1)"
echo 3 >/proc/sys/vm/drop_caches
result root_sum_again "$(sha256sum /mnt/file | cut -d' ' -f1)"

result ready under-load
wait_for '[ -n "$(disk_of 40960)" ]' && result added "$(disk_of 40960)"
dd if=/mnt/file of="/dev/$(disk_of 40960)" bs=64k 2>/dev/null && sync && result added_written 1
result ready hot-remove
wait_for '[ -z "$(disk_of 40960)" ]' && result removed 1
wait "$LOADING"

result ready grow
wait_for '[ "$(disk_of 786432)" ]' && result grown "$(blockdev --getsize64 "/dev/$(disk_of 786432)")"
dd if=/mnt/file of="/dev/$(disk_of 786432)" bs=1M seek=300 oflag=direct 2>/dev/null && result grown_written 1

FAILING=/dev/$(disk_of 32768)
result before_failure "$(dd if="$FAILING" of=/dev/null bs=64k skip=128 count=1 iflag=direct 2>&1 | grep -c error)"
result ready fail
wait_for '! dd if="$FAILING" of=/dev/null bs=64k skip=128 count=1 iflag=direct 2>/dev/null' && result failure_seen 1
result failure_message "$(dmesg | grep -c 'critical medium error')"
result ready heal
wait_for 'dd if="$FAILING" of=/dev/null bs=64k skip=128 count=1 iflag=direct 2>/dev/null' && result healed 1
result ready inspect
sleep 3
