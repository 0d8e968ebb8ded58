// Package e2enetwork is Kubernetes' own end-to-end suite with nothing in it but the specs of sig-network. Ginkgo wants a test, so this is one, and
// is built by go test -c.
package e2enetwork

import (
	"flag"
	"os"
	"testing"

	// Names the package that makes the ginkgo program recognise this one as a suite.
	_ "github.com/onsi/ginkgo/v2"

	"k8s.io/kubernetes/test/e2e"
	"k8s.io/kubernetes/test/e2e/framework"
	"k8s.io/kubernetes/test/e2e/framework/config"
	"k8s.io/kubernetes/test/e2e/framework/testfiles"
	manifests "k8s.io/kubernetes/test/e2e/testing-manifests"

	// The specs, and the labels that they carry.
	_ "k8s.io/kubernetes/test/e2e/feature"
	_ "k8s.io/kubernetes/test/e2e/common/network"
	_ "k8s.io/kubernetes/test/e2e/network"

	// What a failed spec prints of the cluster, and how.
	_ "k8s.io/kubernetes/test/e2e/framework/debug/init"
	_ "k8s.io/kubernetes/test/e2e/framework/metrics/init"
	_ "k8s.io/kubernetes/test/e2e/framework/node/init"
	_ "k8s.io/kubernetes/test/utils/format"
)

func TestMain(m *testing.M) {
	for _, register := range []func(*flag.FlagSet){framework.RegisterCommonFlags, framework.RegisterClusterFlags} {
		register(flag.CommandLine)
	}
	config.CopyFlags(config.Flags, flag.CommandLine)
	flag.Parse()
	testfiles.AddFileSource(manifests.GetE2ETestingManifestsFS())
	framework.AfterReadingAllFlags(&framework.TestContext)
	os.Exit(m.Run())
}

func TestNetwork(t *testing.T) { e2e.RunE2ETests(t) }
