// Command kube holds every Kubernetes program of the lab in one executable: they share most of their packages, so one link
// instead of six. The program is chosen by the name it is called by (kubectl is a symbolic link to it) or by the first argument.
package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	_ "time/tzdata"

	"github.com/spf13/cobra"
	"k8s.io/component-base/cli"
	_ "k8s.io/component-base/logs/json/register"
	_ "k8s.io/component-base/metrics/prometheus/clientgo"
	_ "k8s.io/component-base/metrics/prometheus/version"
	kubectl "k8s.io/kubectl/pkg/cmd"
	kubectlutil "k8s.io/kubectl/pkg/cmd/util"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	controllers "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	proxy "k8s.io/kubernetes/cmd/kube-proxy/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
	kubelet "k8s.io/kubernetes/cmd/kubelet/app"
)

var programs = map[string]func() *cobra.Command{
	"kube-apiserver":          apiserver.NewAPIServerCommand,
	"kube-controller-manager": controllers.NewControllerManagerCommand,
	"kube-scheduler":          func() *cobra.Command { return scheduler.NewSchedulerCommand() },
	"kube-proxy":              proxy.NewProxyCommand,
	"kubelet":                 func() *cobra.Command { return kubelet.NewKubeletCommand(context.Background()) },
	"kubectl":                 kubectl.NewDefaultKubectlCommand,
}

// choose returns the program to be, and drops its name from os.Args if it was the first argument.
func choose() string {
	if name := filepath.Base(os.Args[0]); programs[name] != nil {
		return name
	}
	if len(os.Args) > 1 && programs[os.Args[1]] != nil {
		os.Args = os.Args[1:]
		return os.Args[0]
	}
	return ""
}

func main() {
	name := choose()
	switch name {
	case "":
		known := make([]string, 0, len(programs))
		for program := range programs {
			known = append(known, program)
		}
		slices.Sort(known)
		fmt.Fprintf(os.Stderr, "usage: kube PROGRAM ARGUMENTS...\nprograms: %s\n", strings.Join(known, ", "))
		os.Exit(2)
	case "kubectl":
		// kubectl prints its errors itself, and a plugin's exit status is its own.
		if err := cli.RunNoErrOutput(programs[name]()); err != nil {
			kubectlutil.CheckErr(err)
		}
	default:
		os.Exit(cli.Run(programs[name]()))
	}
}
