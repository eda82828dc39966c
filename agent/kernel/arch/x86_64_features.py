"""What a program may have come to depend on in an x86-64 CPU: instructions, places of its extended state.

Instructions are known by the words of /proc/cpuinfo ("flags": arch/x86/include/asm/cpufeatures.h). A program
chooses its code by them once, so each of them must be there wherever it goes on. Some words are the host's
own affair; those are left out by name, and a word that is not known here counts.

Extended state (CPUID leaf 0xD, XGETBV) comes in components. Ptrace and signal frames have them at fixed
places, which differ between makers of CPUs; a component is a word here too: "xstate-9@2688+8".
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import struct
from typing import Final

# Words that say nothing to a program, by why that is so.
HOST_ONLY: Final = {
    "virtualization: for hypervisors": (
        "hypervisor vmx svm ept ept_ad ept_x_only ept_5level ept_violation_ve vpid vnmi flexpriority "
        "tpr_shadow vmmcall vmcall npt lbrv svm_lock nrip_save tsc_scale vmcb_clean flushbyasid "
        "decodeassists pausefilter pfthreshold avic v_vmsave_vmload vgif x2avic v_spec_ctrl tdx_guest "
        "tdx_host_platform sme sev sev_es sev_snp debug_swap coherency_sfw_no"
    ),
    "power and frequency: for the kernel's governors": (
        "acpi aperfmperf dtherm ida arat pln pts tm tm2 est epb dts hwp hwp_notify hwp_act_window "
        "hwp_epp hwp_pkg_req hfi cpb hw_pstate proc_feedback cppc amd_hetero_cores amd_workload_class"
    ),
    "time: how the kernel judges the time stamp counter, which no program finds going on after a move": (
        "constant_tsc nonstop_tsc nonstop_tsc_s3 tsc_known_freq tsc_reliable tsc_deadline_timer "
        "tsc_adjust art"
    ),
    "mitigations: what the kernel does about weaknesses, and what helps it": (
        "pti ibrs ibrs_enhanced ibpb ibpb_brtype ibrs_exit_ibpb stibp ssbd virt_ssbd amd_ssbd "
        "spec_ctrl intel_stibp amd_ibrs amd_ibpb amd_stibp auto_ibrs md_clear flush_l1d "
        "arch_capabilities core_capabilities retpoline retpoline_amd retpoline_lfence rsb_ctxsw "
        "rsb_vmexit btc_no srso_no fb_clear rrsba_ctrl bhi_ctrl clear_bhb_hw clear_bhb_loop bhi_no "
        "its_no lfence_rdtsc mfence_rdtsc null_sel_clr_base no_nested_data_bp verw_clear "
        "split_lock_detect bus_lock_detect tsx_force_abort rtm_always_abort use_ibpb use_ibrs_fw "
        "entry_ibpb unret call_depth rethunk stibp_always_on"
    ),
    "privileged: instructions, registers and page tables of the kernel": (
        "vme de pse pse36 pae pge mtrr pat mca mce msr apic x2apic extapic xtpr cid pdcm nx pdpe1gb "
        "smep smap umip pcid invpcid invpcid_single la57 pks xsaves monitor wbnoinvd pconfig tme smx "
        "cr8_legacy skinit osvw overflow_recov succor smca cpuid_fault lkgs fred wrmsrns invlpgb lass"
    ),
    "devices: usable only through a device of the host, whose memory does not move": "sgx sgx_lc enqcmd",
    "counting and tracing: for perf, whose descriptors do not move": (
        "arch_perfmon pebs bts ds_cpl dtes64 perfctr_core perfctr_nb perfctr_llc perfctr_l2 "
        "perfmon_v2 bpext ptsc ibs irperf intel_pt arch_lbr amd_lbr_v2 amd_lbr_pmc_freeze wdt sdbg "
        "intel_ppin amd_ppin pbe"
    ),
    "caches and sharing of them: for resctrl": (
        "cqm cqm_llc cqm_occup_llc cqm_mbm_total cqm_mbm_local rdt_a cat_l2 cat_l3 cdp_l2 cdp_l3 mba "
        "smba bmec abmc sdciae dca ss"
    ),
    "topology": "ht xtopology topoext extd_apicid nodeid_msr amd_dcm cmp_legacy up",
    "speed: the instructions are there without it": (
        "rep_good erms fsrm fzrm fsrs fsrc fxsr_opt xsaveerptr cpuid"
    ),
}
_HOST_ONLY_WORDS: Final = frozenset(word for words in HOST_ONLY.values() for word in words.split())

# uint64_t xgetbv(void)
_XGETBV: Final = bytes.fromhex(
    "31c9"  #         xor ecx, ecx
    "0f01d0"  #       xgetbv
    "48c1e220"  #     shl rdx, 32
    "4809d0"  #       or rax, rdx
    "c3"  #           ret
)
# void cpuid(uint32_t leaf, uint32_t subleaf, uint32_t registers[4])
_CPUID: Final = bytes.fromhex(
    "53"  #           push rbx
    "4989d0"  #       mov r8, rdx
    "89f8"  #         mov eax, edi
    "89f1"  #         mov ecx, esi
    "0fa2"  #         cpuid
    "418900"  #       mov [r8], eax
    "41895804"  #     mov [r8+4], ebx
    "41894808"  #     mov [r8+8], ecx
    "4189500c"  #     mov [r8+12], edx
    "5b"  #           pop rbx
    "c3"  #           ret
)
_OSXSAVE: Final = 1 << 27  # CPUID.1:ECX
_XSTATE_LEAF: Final = 0xD
_FIRST_EXTENDED: Final = 2  # x87 and SSE have had their place in the first 512 bytes since before XSAVE

# the xsave area in ptrace's form (asm/user.h, asm/fpu/types.h)
_XCR0_AT: Final = 464  # software bytes: what the kernel has switched on
_HEADER_AT: Final = 512  # XSTATE_BV, XCOMP_BV


def program_words(cpuinfo: str) -> frozenset[str]:
    """The words of /proc/cpuinfo that a program may depend on."""
    for line in cpuinfo.splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split()) - _HOST_ONLY_WORDS
    return frozenset()


@functools.cache
def _text() -> mmap.mmap:
    """Executable memory with the two functions in it."""
    everything = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    memory = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=everything)
    memory.write(_XGETBV.ljust(64, b"\xcc") + _CPUID)
    return memory


def _address() -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(_text()))


def cpuid(leaf: int, subleaf: int = 0) -> tuple[int, int, int, int]:
    """EAX, EBX, ECX, EDX."""
    answer = (ctypes.c_uint32 * 4)()
    function = ctypes.CFUNCTYPE(None, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p)(_address() + 64)
    function(leaf, subleaf, ctypes.addressof(answer))
    eax, ebx, ecx, edx = answer
    return eax, ebx, ecx, edx


def xcr0() -> int:
    """The components of extended state that the kernel has switched on, as a set of bits."""
    if not cpuid(1)[2] & _OSXSAVE:
        return 0
    return int(ctypes.CFUNCTYPE(ctypes.c_uint64)(_address())())


def xstate_words() -> frozenset[str]:
    """Each component with its number, its offset in the standard form, and its size."""
    enabled = xcr0()
    found = set()
    for number in range(_FIRST_EXTENDED, 63):
        if enabled >> number & 1:
            size, offset, _, _ = cpuid(_XSTATE_LEAF, number)
            found.add(f"xstate-{number}@{offset}+{size}")
    return frozenset(found)


def fitted(theirs: bytes, ours: bytes) -> bytes:
    """The xsave area `theirs` of a CPU with fewer components as one of ours: they are at the same places.

    `ours`: any area of this CPU. What `theirs` does not have is in its initial state.
    """
    if len(theirs) > len(ours):
        raise ValueError(f"{len(theirs)} bytes of extended state, {len(ours)} here")
    padded = bytearray(theirs.ljust(len(ours), b"\0"))
    padded[_XCR0_AT : _XCR0_AT + 8] = ours[_XCR0_AT : _XCR0_AT + 8]
    return bytes(padded)


def components(area: bytes) -> int:
    """Those that are not in their initial state."""
    return int(struct.unpack_from("<Q", area, _HEADER_AT)[0])
