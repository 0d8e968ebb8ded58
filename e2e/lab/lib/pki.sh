# shellcheck shell=bash
# Keys and certificates of one cluster, in $STATE/pki. Elliptic curves: a key takes milliseconds.

pki_key() { openssl ecparam -name prime256v1 -genkey -noout -out "$1.key" 2> /dev/null; }

pki_authority() {
  pki_key "$1"
  openssl req -x509 -new -key "$1.key" -subj "/CN=$1" -days 3650 -out "$1.crt" \
    -addext keyUsage=critical,keyCertSign,cRLSign,digitalSignature -addext basicConstraints=critical,CA:true 2> /dev/null
}

# pki_leaf NAME SUBJECT USAGE [ALTERNATIVE NAMES] [AUTHORITY]
pki_leaf() {
  local extensions
  extensions=$(printf 'keyUsage=digitalSignature,keyEncipherment\nextendedKeyUsage=%s\n%s' "$3" "${4:+subjectAltName=$4}")
  pki_key "$1"
  openssl req -new -key "$1.key" -subj "$2" 2> /dev/null |
    openssl x509 -req -CA "${5:-ca}.crt" -CAkey "${5:-ca}.key" -CAcreateserial -days 3650 -out "$1.crt" \
      -extfile <(echo "$extensions") 2> /dev/null
}

# pki_make NODES...
pki_make() (
  mkdir -p "$STATE/pki"
  cd "$STATE/pki" || exit
  local k=0 node in_cluster=DNS:kubernetes
  pki_authority ca
  pki_authority front-proxy-ca
  openssl genrsa -out sa.key 2048 2> /dev/null
  openssl rsa -in sa.key -pubout -out sa.pub 2> /dev/null
  in_cluster+=,DNS:kubernetes.default,DNS:kubernetes.default.svc,DNS:kubernetes.default.svc.cluster.local
  pki_leaf apiserver /CN=kube-apiserver serverAuth "$in_cluster,DNS:localhost,IP:$SVC.0.1,IP:$NET.1,IP:127.0.0.1"
  pki_leaf apiserver-kubelet-client /O=system:masters/CN=kube-apiserver-kubelet-client clientAuth
  pki_leaf front-proxy-client /CN=front-proxy-client clientAuth '' front-proxy-ca
  pki_leaf admin /O=system:masters/CN=admin clientAuth
  pki_leaf controllers /CN=system:kube-controller-manager clientAuth
  pki_leaf scheduler /CN=system:kube-scheduler clientAuth
  pki_leaf kube-proxy /CN=system:kube-proxy clientAuth
  for node; do
    k=$((k + 1))
    pki_leaf "$node" "/O=system:nodes/CN=system:node:$node" clientAuth
    pki_leaf "$node-serving" "/O=system:nodes/CN=system:node:$node" serverAuth "DNS:$node,IP:$(node_ip "$k")"
  done
)

# kubeconfig USER [FOLDER OF THE CERTIFICATES]: on stdout
kubeconfig() {
  local pki=${2:-$STATE/pki}
  cat << K
apiVersion: v1
kind: Config
clusters: [{name: lab, cluster: {server: "https://$NET.1:6443", certificate-authority: $pki/ca.crt}}]
users: [{name: $1, user: {client-certificate: $pki/$1.crt, client-key: $pki/$1.key}}]
contexts: [{name: lab, context: {cluster: lab, user: $1}}]
current-context: lab
K
}
