"""OpenShift Origin 3.6 to 3.9 as system containers, laid out as openshift-ansible does."""
