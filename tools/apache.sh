#!/usr/bin/env bash
# Runs Apache RocketMQ 5.5.0 (name server, broker with embedded proxy) in the foreground, for comparisons and golden
# tests: tools/apache.sh DIR PORT [BROKER-KEY=VALUE...]. gRPC on PORT, name server on PORT+2. The file DIR/ready
# appears when it serves, and holds the server's pid. HEAP sets the heap (4g). SIGTERM stops it cleanly.
# `tools/apache.sh admin PORT mqadmin-command...` runs one admin command; `tools/apache.sh fetch` only downloads.
set -euo pipefail
cd "$(dirname "$0")/.."
jars=${FERRYMQ_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/ferrymq}/apache
opens="--add-exports=java.base/sun.nio.ch=ALL-UNNAMED --add-opens=java.base/java.nio=ALL-UNNAMED
  --add-opens=java.base/jdk.internal.misc=ALL-UNNAMED"

fetch() {
  local key
  key=$(sha256sum tests/apache/pom.xml | cut -c1-16)
  [ "$(cat "$jars/done" 2>/dev/null)" = "$key" ] && return
  command -v mvn >/dev/null || { echo "apache: Maven is missing (Debian: apt-get install maven)" >&2; exit 1; }
  echo "apache: downloading Apache RocketMQ once for this machine into $jars" >&2
  rm -rf "$jars" && mkdir -p "$jars"
  (cd tests/apache && mvn -q -B dependency:copy-dependencies -DincludeScope=runtime "-DoutputDirectory=$jars" >&2)
  echo "$key" >"$jars/done"
}
fetch
case ${1:-} in
  fetch) exit ;;
  admin)
    port=$2
    shift 2
    # shellcheck disable=SC2086
    exec java $opens -Xmx256m -cp "$jars/*" org.apache.rocketmq.tools.command.MQAdminStartup "$@" \
      -n "127.0.0.1:$((port + 2))" ;;
esac
dir=$(mkdir -p "$1" && cd "$1" && pwd) port=$2
shift 2
mkdir -p "$dir/conf"
rm -f "$dir/ready"
printf 'listenPort=%s\nkvConfigPath=%s/kv.json\n' $((port + 2)) "$dir" >"$dir/conf/namesrv.conf"
printf '{"rocketMQClusterName":"DefaultCluster","grpcServerPort":%s,"remotingListenPort":%s}\n' "$port" $((port + 1)) \
  >"$dir/conf/rmq-proxy.json"
{
  printf 'brokerClusterName=DefaultCluster\nbrokerName=broker-a\nbrokerId=0\nbrokerIP1=127.0.0.1\nlistenPort=%s\n' $((port + 10))
  printf 'storePathRootDir=%s/store\nstorePathCommitLog=%s/store/commitlog\nrecallMessageEnable=true\n' "$dir" "$dir"
  printf '%s\n' "$@"
} >"$dir/conf/broker.conf"
export ROCKETMQ_HOME=$dir
heap=${HEAP:-4g}
logs="-Drmq.logback.configurationFile= -Duser.home=$dir"
# shellcheck disable=SC2086
java $opens $logs -Xmx256m -cp "$jars/*" org.apache.rocketmq.namesrv.NamesrvStartup -c "$dir/conf/namesrv.conf" \
  >"$dir/namesrv.log" 2>&1 &
namesrv=$!
server=
stop() {
  trap - TERM INT EXIT
  # The broker's store is closed before its name server goes.
  [ -z "$server" ] || { kill "$server" 2>/dev/null; wait "$server" || true; }
  kill "$namesrv" 2>/dev/null
  wait "$namesrv" || true
  exit 0
}
trap stop TERM INT EXIT
up() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
wait_for() {
  for _ in $(seq 600); do
    up "$1" && return
    kill -0 "$2" 2>/dev/null || { echo "apache: a process ended; its log is in $dir" >&2; exit 1; }
    sleep 0.1
  done
  echo "apache: nothing listens on port $1 after 60 s; logs are in $dir" >&2
  exit 1
}
wait_for $((port + 2)) "$namesrv"
# shellcheck disable=SC2086
java $opens $logs -XX:+UseG1GC "-Xms$heap" "-Xmx$heap" ${HEAP_TOUCH:+-XX:+AlwaysPreTouch} -cp "$jars/*" \
  org.apache.rocketmq.proxy.ProxyStartup -pm local -bc "$dir/conf/broker.conf" -pc "$dir/conf/rmq-proxy.json" \
  -n "127.0.0.1:$((port + 2))" >"$dir/server.log" 2>&1 &
server=$!
wait_for "$port" "$server"
echo "$server" >"$dir/ready.tmp" && mv "$dir/ready.tmp" "$dir/ready"
wait "$server"
