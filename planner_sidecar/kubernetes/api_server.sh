#!/bin/bash
# A real Kubernetes API without containers: etcd, kube-apiserver and kube-controller-manager 1.20.2 of Debian bookworm.
# The API server is built once from Debian's source package with Debian's Go; everything it needs lies in that package.
#   api_server.sh build    installs what the build needs (root) and builds; about six minutes of CPU, kept in KUBE_HOME
#   api_server.sh start    prints the folder that holds kubeconfig and the servers' logs
#   api_server.sh stop
set -euo pipefail
home=${KUBE_HOME:-${XDG_CACHE_HOME:-$HOME/.cache}/dynamo-connectors/kubernetes-1.20.2}
port=${KUBE_PORT:-16443} etcd_port=${ETCD_PORT:-12379}
source=$home/kubernetes-1.20.2 run=$home/run
bin=$source/_output/local/bin/linux/amd64

build() {
    # Cached: nothing is asked of anybody.
    [ -x "$bin/kube-controller-manager" ] && [ -x "$bin/kube-apiserver" ] && command -v etcd > /dev/null && return
    apt-get update
    apt-get install -y --no-install-recommends etcd-server golang-1.19-go golang-github-modern-go-reflect2-dev rsync make dpkg-dev
    mkdir -p "$home/apt/lists/partial" "$home/apt/cache/archives/partial"
    cd "$home"
    # The machine's own archive, asked for sources, in a state of its own: the machine's lists stay as they are.
    sed 's/^Types: deb$/Types: deb-src/' /etc/apt/sources.list.d/debian.sources > apt/source.sources
    local own=(-o "Dir::Etc::sourcelist=$home/apt/source.sources" -o Dir::Etc::sourceparts=/dev/null
        -o "Dir::State::lists=$home/apt/lists" -o "Dir::Cache=$home/apt/cache")
    apt-get "${own[@]}" update
    if [ ! -f "$source/.unpacked" ]; then
        rm -rf "$source"
        apt-get "${own[@]}" source --download-only kubernetes=1.20.5+really1.20.2-1.1+deb12u1
        tar xzf kubernetes_1.20*.orig.tar.gz
        cd "$source"
        tar xJf ../kubernetes_1.20*.debian.tar.xz
        while read -r patch; do patch -p1 -s < "debian/patches/$patch"; done < debian/patches/series
        # Under Go 1.18 and later the reflect2 that lies inside kills the API server on the first custom resource.
        local inside=vendor/github.com/modern-go/reflect2
        rm -f $inside/*.go $inside/*.s
        cp /usr/share/gocode/src/github.com/modern-go/reflect2/*.{go,s} $inside/
        rm -f $inside/*_test.go
        touch .unpacked
    fi
    cd "$source"
    mkdir -p "$home/home" .go/src/k8s.io
    [ -L .go/src/k8s.io/kubernetes ] || ln -s ../../.. .go/src/k8s.io/kubernetes
    env GOPATH="$PWD/.go" PATH="/usr/lib/go-1.19/bin:$PATH" CGO_ENABLED=0 HOME="$home/home" GOFLAGS= GO111MODULE=off \
        KUBE_GIT_TREE_STATE=archive KUBE_GIT_VERSION=v1.20.2 KUBE_GIT_MAJOR=1 KUBE_GIT_MINOR=20 KUBE_GIT_COMMIT=debian \
        make WHAT="cmd/kube-apiserver cmd/kube-controller-manager"
}

start() {
    rm -rf "$run"
    mkdir -p "$run/etcd" "$run/certificates"
    cd "$run"
    openssl genrsa -out account.key 2048 2> /dev/null
    # The planner logs in with a token of its own, bound to kubernetes/rbac.yaml by the tests.
    printf '%s\n' admin-token,admin,admin,system:masters planner-token,system:serviceaccount:default:dynamo-planner,planner > tokens.csv
    etcd --data-dir "$run/etcd" --listen-client-urls "http://127.0.0.1:$etcd_port" --unsafe-no-fsync \
        --advertise-client-urls "http://127.0.0.1:$etcd_port" --listen-peer-urls "http://127.0.0.1:$((etcd_port + 1))" > etcd.log 2>&1 &
    echo $! > etcd.pid
    "$bin/kube-apiserver" --etcd-servers="http://127.0.0.1:$etcd_port" --secure-port="$port" --bind-address=127.0.0.1 \
        --advertise-address=127.0.0.1 --cert-dir="$run/certificates" --service-account-key-file=account.key \
        --service-account-signing-key-file=account.key --service-account-issuer=https://kubernetes.default.svc \
        --token-auth-file=tokens.csv --authorization-mode=RBAC --service-cluster-ip-range=10.0.0.0/24 \
        --disable-admission-plugins=ServiceAccount > apiserver.log 2>&1 &
    echo $! > apiserver.pid
    for name in admin planner; do
        cat > "$name.kubeconfig" << KUBECONFIG
apiVersion: v1
kind: Config
clusters: [{name: local, cluster: {server: "https://127.0.0.1:$port", insecure-skip-tls-verify: true}}]
users: [{name: $name, user: {token: $name-token}}]
contexts: [{name: local, context: {cluster: local, user: $name, namespace: default}}]
current-context: local
KUBECONFIG
    done
    for _ in $(seq 240); do
        curl -sk -H 'Authorization: Bearer admin-token' "https://127.0.0.1:$port/readyz" | grep -qx ok && break
        sleep 0.5
    done
    "$bin/kube-controller-manager" --kubeconfig=admin.kubeconfig --controllers=deployment,replicaset,statefulset,garbagecollector,horizontalpodautoscaling \
        --horizontal-pod-autoscaler-sync-period=1s \
        --service-account-private-key-file=account.key --leader-elect=false --port=0 --secure-port=$((port + 1)) \
        --bind-address=127.0.0.1 --cert-dir="$run/certificates" > controllers.log 2>&1 &
    echo $! > controllers.pid
    echo "$run"
}

stop() {
    for part in controllers apiserver etcd; do
        [ ! -f "$run/$part.pid" ] || kill "$(cat "$run/$part.pid")" 2> /dev/null || true
    done
}

case "${1:-}" in
    build | start | stop) "$1" ;;
    *) sed -n 's/^# \{0,1\}//p' "$0" >&2 && exit 2 ;;
esac
