# What the scripts of the stock guests share.

wait_for() { # CONDITION: up to 60 s
    for _ in $(seq 300); do
        eval "$1" && return 0
        sleep 0.2
    done
    return 1
}

disk_of() { # SECTORS: the disk of that size, whichever name it has
    for block in /sys/block/sd*; do
        [ "$(cat "$block/size" 2>/dev/null)" = "$1" ] && basename "$block"
    done
}

