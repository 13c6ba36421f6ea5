#!/bin/sh
# A certificate of MLflow's server for these names or addresses, and for this machine's own:
#   sudo infra/mlflow/certificate.sh 10.0.0.7 mlflow.internal
# Nobody signs it but itself, so clients are given it: MLFLOW_TRACKING_SERVER_CERT_PATH. It is valid for
# two years; to renew it delete the folder, run this again and hand tls.crt out anew.
set -eu
folder=${MLFLOW_TLS:-$(dirname "$0")/tls}
[ ! -e "$folder/tls.key" ] || { echo "error: $folder/tls.key is there already" >&2; exit 2; }
names="DNS:localhost,IP:127.0.0.1"
for name in "$@"; do
    case $name in
        *[!0-9.]*) names="$names,DNS:$name" ;;
        *) names="$names,IP:$name" ;;
    esac
done
mkdir -p "$folder"
umask 077
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 730 \
    -subj "/CN=${1:-localhost}" -addext "subjectAltName=$names" \
    -addext "extendedKeyUsage=serverAuth" \
    -keyout "$folder/tls.key" -out "$folder/tls.crt" 2>/dev/null
chmod 644 "$folder/tls.crt"
# The container's user reads the key.
[ "$(id -u)" != 0 ] || chown 10001 "$folder/tls.key"
echo "$folder/tls.crt is for $names"
