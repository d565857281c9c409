
# Commands from the console, "NUMBER COMMAND" a line; what they print comes out in lines that begin with OUT.
stty -echo
result ready shell
while read -r number command; do
    eval "$command" >/tmp/said 2>&1 </dev/null
    status=$?
    result "begun$number" "$command"
    awk '{ print "OUT " $0 }' /tmp/said
    result "done$number" "$status"
done
