#!/bin/sh
# Runs train.py under accelerate as the first process of a container, and passes signals on to it.
#
# As the first process, the launcher ignores SIGTERM. Elsewhere SIGTERM ends it before train.py has saved its
# checkpoint. So this script sends the signal to train.py itself, and waits until the checkpoint is saved. The exit code
# is 143 after a signal (the run can be resumed), and otherwise that of the launcher (0 or 1).
set -u
umask 0002 # another user of group 0 may go on with the run, and use the cache

launcher=
stopped=

# shellcheck disable=SC2317,SC2329 # the trap calls it
forward() {
    stopped=yes
    children=$(cat "/proc/$launcher/task/$launcher/children" 2>/dev/null)
    # While the launcher is still starting, it has no children.
    # shellcheck disable=SC2086 # $children holds several numbers
    kill -TERM ${children:-$launcher} 2>/dev/null
}
trap forward TERM INT HUP

app=$(dirname "$0")
[ -f "$app/train.py" ] || app=$app/.. # in a checkout
several=
[ "${PROCESSES:-1}" = 1 ] || several="--multi_gpu --num_processes $PROCESSES" # one for each GPU
# shellcheck disable=SC2086 # $several holds several words, or none
accelerate launch --quiet --config_file "${ACCELERATE_CONFIG:-$app/accelerate_config.yaml}" $several "$app/train.py" "$@" &
launcher=$!
while kill -0 "$launcher" 2>/dev/null; do # a signal ends the wait, not the launcher
    wait "$launcher"
    status=$?
done
[ -n "$stopped" ] && exit 143
exit "$status"
